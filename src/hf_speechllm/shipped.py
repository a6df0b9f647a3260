"""Where the folders that come with the package lie: inside an installed wheel, or at the root of a source checkout."""

from pathlib import Path


SHIPPED_MODEL = "u2pp_moe_digits"
SHIPPED_SYNTHESISER = "cosyvoice_digits"


def shipped_folder(*parts: str) -> Path:
    """A shipped folder, for example `shipped_folder("pretrained", "u2pp_moe_digits")`.

    Raises:
        FileNotFoundError: neither place has it.
    """
    package = Path(__file__).resolve().parent
    places = [package.joinpath(*parts), package.parents[1].joinpath(*parts)]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{'/'.join(parts)}: expected it at {' or '.join(map(str, places))}")


def shipped_model_path() -> Path:
    """The folder of the shipped digits model.

    Raises:
        FileNotFoundError: it is not there, or has no config.json.
    """
    folder = shipped_folder("pretrained", SHIPPED_MODEL)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected config.json")
    return folder
