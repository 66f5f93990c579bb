"""Cut one checked patch per cell and publish them as a dataset, cells/.

ray job submit --working-dir . -- python jobs/prepare.py --config configs/bbbc021.yaml
Reads CellProfiler tables and fields of view, or ready-made stacks; writes prepare.output.
"""

from cp2image.command import run_job
from cp2image.preparation import prepare

if __name__ == "__main__":
    reads = [
        f"prepare.{name}"
        for name in ["tables", "metadata_files", "images", "image_folders", "stacks.index"]
    ]
    raise SystemExit(
        run_job(__doc__, prepare, reads=reads, writes=["prepare.output"], plates_of="prepare")
    )
