"""Where there is no GPU, one test of this folder says so by being skipped, and the others are not collected."""

from pathlib import Path

from tests.gpu.place import found

collect_ignore = [] if found() else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_there"]
