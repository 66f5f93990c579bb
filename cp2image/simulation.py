"""A simulated screen on disk, for demonstrations and tests. Step."""

import json
from dataclasses import asdict

from cp2image.config import Config
from cp2image.data.simulate import SimulatedFiles, SimulatedScreen, simulate_screen
from cp2image.errors import DatasetError
from cp2image.storage import exists, join, list_files, read_bytes, write_bytes

MARK = "_simulated.json"
"""What was simulated, and, once all is written, which files there are."""


def simulate(config: Config) -> SimulatedFiles:
    """Write the screen that ``simulate`` and ``run.seed`` describe, unless it is there already.

    An interrupted run is taken up again: the same settings write the same files.

    Returns
    -------
    SimulatedFiles
        Where everything is.

    Raises
    ------
    ConfigError
        If the settings are out of range, or the cells do not fit into their fields.
    DatasetError
        If the folder holds another screen, or anything else.
    StorageError
        If the folder cannot be written.
    """
    settings = config.simulate.model_dump(exclude={"output"})
    screen = SimulatedScreen(**settings, seed=config.run.seed)
    wanted = {"screen": asdict(screen)}
    uri = config.simulate.output
    place = join(uri, MARK)
    known = json.loads(read_bytes(place)) if exists(place) else None
    if known is None and list_files(uri):
        raise DatasetError(
            f"{uri}: holds files that are no simulated screen; name another folder in "
            "simulate.output"
        )
    if known is not None and known["screen"] != wanted["screen"]:
        differ = {k: v for k, v in known["screen"].items() if v != wanted["screen"].get(k)}
        raise DatasetError(
            f"{uri}: holds a simulated screen with other settings ({differ}); name another folder "
            "in simulate.output, or remove this one yourself"
        )
    if known is not None and "files" in known:
        return SimulatedFiles(**known["files"])
    write_bytes(place, json.dumps(wanted, indent=1).encode())
    files = simulate_screen(uri, screen)
    write_bytes(place, json.dumps({**wanted, "files": asdict(files)}, indent=1).encode())
    return files
