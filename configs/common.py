"""Every default of every run, in one place. Imports ml_collections alone.

A config file (``configs/dense121.py`` ...) sets the backbone and applies variants; the command line overrides
single fields: ``--config.train.batch_size=32``. Sources in brackets: R = requirement, A = ambiguity settled by us
(docs/reproduction.md lists both).
"""

from ml_collections import ConfigDict


def get_config(name: str, backbone: str, variants: str = "") -> ConfigDict:
    """Return the paper's settings for `backbone`, then apply `variants`, a comma-separated list of VARIANTS.

    Every field has its final type, so overrides are checked.
    """
    config = ConfigDict()
    config.name = name  # names the default workdir, runs/NAME
    config.seed = 0  # root of every random draw of a run (weights, order, augmentation, dropout)
    config.data = _data()
    config.augment = _augment()
    config.model = _model(backbone)
    config.init = _init()
    config.optimizer = _optimizer()
    config.train = _train()
    config.eval = _eval()
    config.benchmark = _benchmark()
    for variant in filter(None, variants.split(",")):
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r} of configs/{name}.py; known are {', '.join(VARIANTS)}")
        VARIANTS[variant](config)
        config.name += f"-{variant}"
    return config


def _data() -> ConfigDict:
    return ConfigDict(
        {
            # 'auto' (prepared ChestX-ray14, else the phantom) | 'chestxray14' | 'chest_phantom' | 'image_folder'
            "name": "auto",  # which data set
            "data_dir": "data",  # where prepared data sets live; relative to the working directory
            # The NIH download (CSV files, lists, images at any depth), or the folder of one's own images.
            "manual_dir": "",  # read by --mode=prepare
            "image_size": 224,  # px, side of the stored and trained image (Tables 2, 3)
            "normalization": "min_max",  # 'min_max' per image (R8) | 'div255'; imported weights bring ImageNet's (A17)
            "dev_fraction": 0.1,  # share of the official training list kept for dev (R4)
            "dev_split": "image",  # 'image' (the paper's, stratified) | 'patient' (disjoint patients) (A23)
            "split_seed": 0,  # draws the dev split
            # True: images with only other findings are kept, as negatives; the paper leaves them out (R2)
            "other_findings": False,  # read by --mode=prepare, and names the prepared set
            "allow_missing": False,  # True: prepare the images that are there, a subset of the lists
            "sampling": "all",  # an epoch is 'all' images (the paper's) | 'balanced': positives and k negatives each
            "negatives_per_positive": 4,  # k of 'balanced': of each positive, repeated or not; drawn anew every epoch
            "num_negatives": 0,  # drawn for an epoch of 'balanced' in place of k of each positive; 0 = k of each
            "positives_repeated": 1,  # times every positive stands in an epoch of 'balanced'
            # '' | 'view': the negatives of a 'balanced' epoch have the positives' shares of views, so that the view
            "strata": "",  # says nothing of the label; an unknown view is one of its own, too few negatives repeat
            # Images of other views are in no split; the data must know views: ChestX-ray14, a table with column `view`
            "views": "",  # '' = all | some, separated by commas, such as 'PA'
            "num_threads": 1,  # reader threads; one gives 16,000 images/s at 224 px, more of them less: for slow disks
            "num_workers": 0,  # processes that prepare data; 0 = one for each core
            "folder": {  # of 'image_folder'
                "positive": "cardiomegaly",  # label 1: name of its folders, or value in the table's column `label`
                "negative": "no_finding",  # label 0
                "patient_regex": "",  # finds the patient in an image's path (group 1, else the match); '' = unknown
                "table": "",  # CSV with path, label, and if known patient, split, boxes, view, sex, age; '' = folders
                "test_fraction": 0.15,  # share of test where no split is named; drawn by patient
            },
            "phantom": {
                "preset": "hard",  # 'easy' | 'hard' | 'natural'
                "num_patients": 1000,  # of 1-4 images each; 70 % train, 15 % dev, 15 % test
                "prevalence": 0.3,  # share of patients with cardiomegaly; ignored by 'natural'
                "label_noise": 0.0,  # probability that an image's label is flipped
                "seed": 0,  # draws the phantoms
                "box": "mask",  # about the 'mask' of the heart | the cardiac silhouette, as a 'radiologist' boxes it
            },
        }
    )


def _augment() -> ConfigDict:
    # Ranges in Keras' ImageDataGenerator units (R10, A7, A8); fill is 'nearest'.
    return ConfigDict(
        {
            "enabled": True,  # training images only
            "shift": 0.1,  # fraction of the side, both ways, both axes
            "rotation_deg": 3.0,  # +- degrees
            "shear_deg": 0.01,  # +- degrees
            "zoom": 0.125,  # each axis by 1 - zoom ... 1 + zoom
            "brightness": (0.7, 1.5),  # factor, drawn uniformly
            "horizontal_flip": False,  # the heart is on one side: laterality is signal
        }
    )


def _model(backbone: str) -> ConfigDict:
    return ConfigDict(
        {
            "backbone": backbone,  # 'densenet121' | 'densenet201' | 'resnet50' | 'inception_resnet_v2' (Table 2)
            "stride": 32,  # px between cells of the feature map: 32 (the paper) | 16 | 8
            # 'cut': ends after the last stage of that stride | 'dilate': keeps all, later strides become dilations
            "stride_by": "cut",  # how a stride below 32 is made
            # share of the running moments that a step leaves as it was; at .99 they lag in runs of a few hundred steps
            "batch_norm_momentum": 0.99,  # Keras' default
            "pooling": "amm",  # 'amm' (Eq. 9) | 'gap' | the others of cxa_jax.pooling.POOLINGS
            "head": "mlp",  # 'mlp': dense 128 ELU, dense 1 (Table 3) | 'linear': dense 1 (exact CAM)
            "labels": "cardiomegaly",  # 'cardiomegaly' | 'findings': NIH's 13 others too, a map for each (A3); X-rays
            # 'normalized': W multiplies BN(F) | 'raw': F (A1) | 'all_normalized': BN(F), and GAP and the others read it
            "attended": "normalized",  # what the pooling reads
            "attention_bound": 0.0,  # b: z -> b tanh(z / b), so W stays off 0 and 1; 0 = unbounded, the paper
            # 'glorot_uniform' (Table 3) | 'he_normal': the backbone's, as in PyTorch's DenseNets; not imported ones
            "kernel_init": "glorot_uniform",  # what fresh convolution kernels are drawn from
            "dropout": 0.5,  # before each dense layer of the head (A6)
            "dtype": "float32",  # compute type of the backbone: 'float32' | 'bfloat16' (GPUs; the rest stays float32)
            "implementation": "auto",  # graph of the backbone: 'auto' | 'plain' | 'fused' | 'kernels'; same function
        }
    )


def _init() -> ConfigDict:
    # Where the backbone's weights come from, one of them; all empty: Glorot uniform (Table 3). AMM and head start fresh
    # but from `weights`.
    return ConfigDict(
        {
            "keras_weights": "",  # file of Keras applications weights (R11)
            "torch_weights": "",  # state dict of a PyTorch DenseNet (.safetensors, .pt, .pth)
            # 'imagenet_torch' (torchvision) | 'xrv' (torchxrayvision) | 'div255'
            "torch_normalization": "imagenet_torch",  # of the images those weights were trained on
            "run": "",  # workdir of another run, such as one on phantoms: the backbone of its best state
            # 'nih128', another name in weights/, or a file that --mode=export wrote: the backbone, and each of AMM and
            "weights": "",  # head that has the same pooling, labels and shapes
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "name": "sgd",  # 'sgd' (R12) | 'adamw'
            "learning_rate": 1e-4,  # R12
            "momentum": 0.9,  # R12; beta1 of 'adamw'
            "nesterov": False,  # Nesterov's momentum
            # of kernels, not of norms and biases: 'sgd' adds it to the gradient, as PyTorch; 'adamw' to the update
            "weight_decay": 0.0,  # share of each weight
            "clip_norm": 0.0,  # the gradient is scaled down to this norm where it is larger; 0 = never
            # of the network's part 'amm' or 'gate', but for amm/norm: BN(F) is what the classifier reads, too
            "attention_rate_factor": 1.0,  # times the rate of the attention branch
            "attention_weight_decay": 0.0,  # of the branch's kernels, besides weight_decay
            # The average of the weights over steps, the newest 1 - ema_decay of it, is evaluated and kept; training
            # goes on with the last ones. Needs train.recompute_moments: running moments fit the last weights alone.
            "ema_decay": 0.0,  # 0 = the last weights
            # 'plateau' (R13) | 'cosine': to 0 at the end of train.num_epochs | 'constant'
            "schedule": "plateau",  # of the rate
            "warmup_steps": 0,  # in which the rate rises from 0, a line, before its schedule
            "plateau_factor": 0.3,  # new rate = rate x factor (R13, A9)
            "plateau_patience": 15,  # epochs without improvement before the rate falls (R13)
            "plateau_min_delta": 1e-4,  # absolute improvement that counts (A10)
            "early_stop_patience": 40,  # epochs without improvement before the run ends (R14)
            "early_stop_min_delta": 0.0,  # A10
        }
    )


def _train() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 16,  # R12, over all devices together
            "accumulate_steps": 1,  # parts a batch goes through in, one by one: less memory; batch norm sees parts
            "num_epochs": 200,  # at most (A24)
            "class_weights": "balanced",  # 'balanced': N / (2 N_c) over the images of an epoch (R9, A12) | 'none'
            "loss": "bce",  # 'bce' (Eq. 1) | 'smoothed' | 'gce': for labels that may be wrong; dev_loss stays Eq. (1)
            "label_smoothing": 0.1,  # of 'smoothed': 0 is Eq. (1), 1 forgets the labels
            "gce_exponent": 0.7,  # of 'gce': towards 0 Eq. (1), 1 the mean absolute error
            "attention_negative_weight": 0.0,  # adds weight x mean W over negatives to the loss; 0 = the paper's loss
            # Training batches, not augmented, whose moments replace batch norm's running ones in what is evaluated and
            # kept: running ones lag in short epochs. Also at another config.eval.image_size. A backbone from
            # config.init brings its own moments, which lag as long as fresh ones do; recomputing needs none of them.
            "recompute_moments": 0,  # batches before each dev evaluation; 0 = running moments (the paper's)
            "select_by": "dev_loss",  # 'dev_loss' (R14, unweighted: A13) | 'dev_loss_weighted' | 'dev_auroc'
            "remat": False,  # recompute activations in the backward pass: less memory, more time, the same function
            "checkpoint_every_steps": 0,  # besides every epoch's end; 0 = epochs only
            "resume_changed": False,  # True: resume although config or data differ from the run's
        }
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 32,  # images; memory is bounded by it
            "image_size": 0,  # px, test-time size; 0 = the training size (A14)
            # 1: the image alone | 2 to 9: and copies of it, shifted and zoomed a little; logits and maps are averaged
            "num_copies": 1,  # looks at each image in a test, one after the other: so many times the time
            "overlay_intensity": 0.2,  # of the colour map over the X-ray (Figs. 1, 8)
            "levels_run": "",  # workdir of a phantom run, whose dev hearts tuned how maps become boxes; '' = init.run
            "cardiothoracic_ratio": False,  # True: a reader of it, fitted on drawings in 20 s, is kept and tested
            "prevalences": (0.0327, 0.0978, 0.2),  # precision, NPV ... are re-weighted to: training list, test, Table 4
            "num_bootstrap": 2000,  # patient-clustered resamples behind each interval
        }
    )


def ablation() -> ConfigDict:
    """Return the section of --mode=ablate, for configs/ablation.py."""
    return ConfigDict(
        {
            "poolings": "amm,gap",  # names separated by commas, or 'all' of cxa_jax.pooling.POOLINGS
            "strides": "",  # of config.model.stride, separated by commas, such as '32,16,8'; '' = the config's own
            "seeds": (0, 1, 2),  # of the trainings
            "rules": "half_max",  # threshold rules, separated by commas: the table has a mean IoU for each
            "num_parallel": 0,  # runs at a time; 0 = one for each core, pinned to it; on an accelerator 1
        }
    )


def _benchmark() -> ConfigDict:
    # --mode=benchmark times the config as it is, on noise.
    return ConfigDict(
        {
            "num_steps": 20,  # timed, of each kind
            "num_warmup": 2,  # run before them, not counted
            "memory_gib": 0.0,  # GiB that the largest batch shall fit; 0 = the device's (a CPU: not searched)
        }
    )


def _gap(config: ConfigDict) -> None:
    """The paper's GAP baseline: average pooling, one dense unit (Table 5, A21)."""
    config.model.pooling = "gap"
    config.model.head = "linear"


def _gap_mlp(config: ConfigDict) -> None:
    """GAP under AMM's own head (A21); AMM's batch norm still differs: configs/ablation.py gives it to both."""
    config.model.pooling = "gap"


def _phantom(config: ConfigDict, num_patients: int, image_size: int) -> None:
    config.data.name = "chest_phantom"
    config.data.phantom.num_patients = num_patients
    config.data.image_size = image_size


def _fit_short_training(config: ConfigDict) -> None:
    """What a run of a few hundred or thousand steps needs: moments that fit its weights, and a rate that ends at 0.

    The averaged weights and their moments are what is tested and kept. Dropout before both dense layers only slows so
    short a training down.
    """
    config.model.dropout = 0.0
    config.model.batch_norm_momentum = 0.9
    config.train.recompute_moments = 24
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.99


def _phantom_quick(config: ConfigDict) -> None:
    """Ten minutes on two cores: cells of 8 px, so that the map shows where, and few epochs, at whose rate it learns."""
    _phantom(config, num_patients=2000, image_size=80)
    _fit_short_training(config)
    _stride_8(config)
    config.optimizer.learning_rate = 0.01  # at 0.02 another rounding of the same sums can learn nothing
    config.train.num_epochs = 4


def _phantom_hour(config: ConfigDict) -> None:
    """Up to an hour on two cores: as phantom_quick, with more phantoms, pixels and epochs."""
    _phantom_quick(config)
    _phantom(config, num_patients=3000, image_size=128)
    config.train.num_epochs = 5


def _research(config: ConfigDict) -> None:
    """Dev patients are in no other split, so that what is chosen on dev is chosen honestly (A23)."""
    config.data.dev_split = "patient"


def _nih_128(config: ConfigDict) -> None:
    """ChestX-ray14 at 128 px, few positives, two cores: every positive twice and four negatives of each an epoch.

    Cells of 8 px, and negatives in the positives' shares of views: training normals are mostly PA, so that else the
    view would tell the class.
    """
    _research(config)
    _fit_short_training(config)
    _stride_8(config)
    config.data.name = "chestxray14"
    config.data.image_size = 128
    config.data.sampling = "balanced"
    config.data.positives_repeated = 2
    config.data.negatives_per_positive = 4
    config.data.strata = "view"
    config.augment.rotation_deg = 7.0
    config.augment.brightness = (0.7, 1.3)
    config.train.batch_size = 32
    config.train.num_epochs = 14
    config.train.select_by = "dev_loss_weighted"
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 1e-4


def _torch_recipe(config: ConfigDict) -> None:
    """The recipe by which a PyTorch DenseNet learns X-rays from scratch, and whatever images are named beside it.

    With its head, average pooling and one dense unit: nih_128,torch_recipe,gap. PyTorch decays norms and biases too,
    zooms both axes alike and leaves out an epoch's last incomplete batch; here kernels alone decay, each axis has its
    own zoom, and every image counts.
    """
    config.data.sampling = "balanced"
    config.data.positives_repeated = 2
    config.data.negatives_per_positive = 2
    config.data.strata = ""
    config.augment.shift = 0.1
    config.augment.rotation_deg = 7.0
    config.augment.shear_deg = 0.0
    config.augment.zoom = 0.125
    config.augment.brightness = (0.7, 1.3)
    config.model.stride = 32
    config.model.batch_norm_momentum = 0.9
    config.model.kernel_init = "he_normal"
    config.model.dropout = 0.0
    config.optimizer.learning_rate = 0.02
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.0
    config.train.recompute_moments = 0
    config.train.batch_size = 32
    config.train.num_epochs = 14


def _stride_16(config: ConfigDict) -> None:
    """Cells 16 px apart: the network cut after the last stage of that stride."""
    config.model.stride = 16


def _stride_8(config: ConfigDict) -> None:
    """Cells 8 px apart: local evidence, which a map needs to show where."""
    config.model.stride = 8


VARIANTS = {
    "gap": _gap,
    "gap_mlp": _gap_mlp,
    "phantom_quick": _phantom_quick,
    "phantom_hour": _phantom_hour,
    "research": _research,
    "nih_128": _nih_128,
    "torch_recipe": _torch_recipe,
    "stride16": _stride_16,
    "stride8": _stride_8,
}
