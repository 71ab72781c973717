"""Write API pages of the public names to build/docs: ``make docs``."""

from importlib import import_module
from pathlib import Path

import pdoc

PACKAGES = ("longspan.attention", "longspan.parallel", "longspan.trainer")
OUT = Path(__file__).parents[1] / "build" / "docs"


def main() -> None:
    for name in PACKAGES:
        package = import_module(name)
        for public in getattr(package, "__all__", ()):
            # Public names are imported when they are first asked for; pdoc reads what is there.
            setattr(package, public, getattr(package, public))
    pdoc.render.configure(docformat="google", show_source=True)
    only_these = [pattern for name in PACKAGES for pattern in (name, f"!{name}.")]
    pdoc.pdoc(*only_these, output_directory=OUT)
    for name in PACKAGES:
        print(OUT / f"{name.replace('.', '/')}.html")


if __name__ == "__main__":
    main()
