"""Running the benchmarks that a config names, and where their tables go. Above the steps."""

from cp2image.benchmarks.report import Findings, Report, observe
from cp2image.config import Config
from cp2image.errors import ConfigError
from cp2image.storage import join, write_bytes


def run_benchmarks(config: Config) -> str:
    """Run the benchmarks of ``benchmark.which``; write each one's table and figures.

    Returns
    -------
    str
        The tables as Markdown, and where they are.

    Raises
    ------
    StorageError
        If ``benchmark.output`` cannot be written.
    """
    write_bytes(  # refused now rather than after minutes of timing
        join(config.benchmark.output, "_config.yaml"), config.yaml().encode()
    )
    texts = []
    for name in config.benchmark.which:
        report = _run(name, config)
        place = join(config.benchmark.output, name)
        write_bytes(f"{place}.md", str(report).encode())
        write_bytes(f"{place}.json", report.to_json().encode())
        texts.append(f"{report}\n{place}.md and .json")
    return "\n\n".join(texts)


def _run(name: str, config: Config) -> Report:
    settings = config.benchmark.model_dump(mode="json")
    return observe(name, lambda: _find(name, config), settings)


def _find(name: str, config: Config) -> Findings:
    match name:  # imported when asked for: each needs other libraries
        case "measure":
            from cp2image.benchmarks.measuring import benchmark_measure

            return benchmark_measure(config)
        case "evaluate":
            from cp2image.benchmarks.evaluating import benchmark_evaluate

            return benchmark_evaluate(config)
        case "generate":
            from cp2image.benchmarks.generating import benchmark_generate

            return benchmark_generate(config)
        case "train":
            from cp2image.benchmarks.training import benchmark_train

            return benchmark_train(config)
        case "input":
            from cp2image.benchmarks.reading import benchmark_input

            return benchmark_input(config)
        case "screen":
            from cp2image.benchmarks.screens import benchmark_screen

            return benchmark_screen(config)
        case _:
            raise ConfigError(f"benchmark.which: no benchmark {name!r}")
