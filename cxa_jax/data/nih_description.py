"""ChestX-ray14 in words: what a prepared set is, and what to do where there is none."""

from ml_collections import ConfigDict

from cxa_jax.data import chestxray14

PREPARE_COMMAND = (
    "python launch.py --mode=prepare --config=configs/dense121.py "
    "--config.data.manual_dir=/path/to/ChestX-ray14 --config.data.image_size={image_size}"
)

# Fields that choose a prepared set, as the command above has them; others are added to it.
PREPARE_DEFAULTS = {
    "data_dir": "data",
    "dev_split": "image",
    "dev_fraction": 0.1,
    "split_seed": 0,
    "other_findings": False,
}


def describe_nih(builder: chestxray14.ChestXray14) -> str:
    """Return what a prepared set is: all of ChestX-ray14 or a part, the paper's task or another."""
    provenance = chestxray14.load_provenance(builder)
    missing = provenance["missing_images"]
    text = "NIH ChestX-ray14" + (f", a part of it: {missing:,} images are missing" if missing else "")
    others = sum(split.get("other_findings", 0) for split in provenance["splits"].values())
    return text + (f"; {others:,} negatives have other findings, which is not the paper's task" if others else "")


def describe_lack(data_config: ConfigDict) -> str:
    """Return that the set of a config is not prepared, what is, and the command that prepares it."""
    prepared = ", ".join(chestxray14.list_prepared(data_config)) or "nothing"
    command = PREPARE_COMMAND.format(image_size=data_config.image_size)
    command += "".join(
        f" --config.data.{field}={data_config[field]}"
        for field, default in PREPARE_DEFAULTS.items()
        if data_config[field] != default
    )
    return (
        f"No ChestX-ray14 of {data_config.image_size} px with these options is prepared in '{data_config.data_dir}' "
        f"(prepared there: {prepared}). To prepare it: {command}"
    )
