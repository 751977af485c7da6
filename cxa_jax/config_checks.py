"""What a config may not say: found before any work, named with its field."""

from ml_collections import ConfigDict

from cxa_jax.averaged_copies import MAX_COPIES
from cxa_jax.data.augment import check_ranges
from cxa_jax.errors import UserError
from cxa_jax.pooling import FEATURES_ONLY

BRANCHLESS = FEATURES_ONLY | {"pcam"}  # poolings without parameters of attention alone
CHOICES = {
    "model.kernel_init": ("glorot_uniform", "he_normal"),
    "optimizer.name": ("sgd", "adamw"),
    "optimizer.schedule": ("plateau", "cosine", "constant"),
    "train.class_weights": ("balanced", "none"),
    "train.loss": ("bce", "smoothed", "gce"),
    "train.select_by": ("dev_loss", "dev_loss_weighted", "dev_auroc"),
    "data.normalization": ("min_max", "div255"),
    "data.dev_split": ("image", "patient"),
    "data.strata": ("", "view"),
    "init.torch_normalization": ("imagenet_torch", "xrv", "div255"),
}
# More is a slip of the hand, and would end where memory or patience does.
MAX_IMAGE_PX, MAX_BATCH, MAX_READERS, MAX_PATIENTS, MAX_RESAMPLES = 8192, 65_536, 1024, 1_000_000, 1_000_000
MAX_REPEATS = 1000
MAX_DECAY = 0.999999  # of an average over steps that is divided by 1 - decay^n: float32 takes more for 1
# What 'balanced' alone reads, with the value that leaves it be.
BALANCED_ONLY = {"strata": "", "num_negatives": 0, "positives_repeated": 1}
INIT_SOURCES = ("keras_weights", "torch_weights", "run", "weights")  # of config.init; a run starts from one at most
# Inclusive bounds; None is no bound.
RANGES = {
    "seed": (0, 2**32 - 1),
    "data.image_size": (1, MAX_IMAGE_PX),
    "train.batch_size": (1, MAX_BATCH),
    "train.num_epochs": (1, None),
    "train.accumulate_steps": (1, None),
    "train.checkpoint_every_steps": (0, None),
    "train.recompute_moments": (0, None),
    "train.label_smoothing": (0, 1),
    "train.gce_exponent": (0.01, 1),
    "train.attention_negative_weight": (0, None),
    "data.num_negatives": (0, None),
    "data.positives_repeated": (1, MAX_REPEATS),
    "data.num_threads": (0, MAX_READERS),
    "data.num_workers": (0, MAX_READERS),
    "data.phantom.num_patients": (1, MAX_PATIENTS),
    "optimizer.learning_rate": (0, 1e30),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, 1e30),
    "optimizer.clip_norm": (0, 1e30),
    "optimizer.attention_rate_factor": (0, 1e30),
    "optimizer.attention_weight_decay": (0, 1e30),
    "optimizer.ema_decay": (0, MAX_DECAY),
    "optimizer.warmup_steps": (0, None),
    "optimizer.plateau_factor": (0, 1),
    "optimizer.plateau_patience": (1, None),
    "optimizer.plateau_min_delta": (0, None),
    "optimizer.early_stop_patience": (1, None),
    "optimizer.early_stop_min_delta": (0, None),
    "eval.batch_size": (1, MAX_BATCH),
    "eval.image_size": (0, MAX_IMAGE_PX),
    "eval.num_copies": (1, MAX_COPIES),
    "eval.overlay_intensity": (0, 1),
    "eval.num_bootstrap": (1, MAX_RESAMPLES),
    "benchmark.num_steps": (1, None),
    "benchmark.num_warmup": (0, None),
    "benchmark.memory_gib": (0, None),
}


def check_config(config: ConfigDict, min_size: int) -> None:
    """Check the fields that nothing else checks early.

    Args:
      config: the whole config.
      min_size: px, the backbone's least image side.

    Raises:
      UserError: a field is outside its choices or range; the message has the field and what is allowed.
    """
    for name, choices in CHOICES.items():
        if _get(config, name) not in choices:
            allowed = ", ".join(choice or "'' (none)" for choice in choices)
            raise UserError(f"config.{name}={_get(config, name)!r} is not one of {allowed}")
    for name, (low, high) in RANGES.items():
        value = _get(config, name)
        if not value >= low or (high is not None and not value <= high):  # also true of nan
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"config.{name}={value} must be {allowed}")
    check_ranges(config.augment)
    for name, neutral in BALANCED_ONLY.items():
        if config.data.sampling == "all" and config.data[name] != neutral:
            raise UserError(f"config.data.{name}={config.data[name]!r} needs --config.data.sampling=balanced")
    if not all(0 < prevalence < 1 for prevalence in config.eval.prevalences):
        raise UserError(f"config.eval.prevalences={config.eval.prevalences}: each is a share between 0 and 1")
    weight, pooling = config.train.attention_negative_weight, config.model.pooling
    if weight and pooling in FEATURES_ONLY:
        raise UserError(
            f"config.train.attention_negative_weight={weight} needs attention, "
            f"and config.model.pooling={pooling!r} has none"
        )
    optimizer = config.optimizer
    for field, unused in (("attention_rate_factor", 1), ("attention_weight_decay", 0)):
        if optimizer[field] != unused and pooling in BRANCHLESS:
            raise UserError(
                f"config.optimizer.{field}={optimizer[field]} needs an attention branch, and config.model.pooling="
                f"{pooling!r} has none: leave it at {unused}"
            )
    if optimizer.name == "adamw" and optimizer.momentum > MAX_DECAY:
        raise UserError(
            f"config.optimizer.momentum={optimizer.momentum} must be from 0 to {MAX_DECAY} with "
            "config.optimizer.name='adamw', which divides by 1 - momentum"
        )
    if optimizer.ema_decay and not config.train.recompute_moments:
        raise UserError(
            f"config.optimizer.ema_decay={optimizer.ema_decay} averages weights, which batch norm's running moments do "
            "not fit: set --config.train.recompute_moments=24, the training batches that they are recomputed on"
        )
    sources = [f"config.init.{name}" for name in INIT_SOURCES if config.init[name]]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)} are set: choose one")
    for name in ("data.image_size", "eval.image_size"):
        if (name == "data.image_size" or _get(config, name)) and _get(config, name) < min_size:
            raise UserError(f"config.{name}={_get(config, name)}: {config.model.backbone} needs at least {min_size} px")


def _get(config: ConfigDict, name: str) -> object:
    section, _, field = name.rpartition(".")
    return config[section][field] if section else config[field]
