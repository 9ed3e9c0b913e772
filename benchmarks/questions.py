"""What the laboratory (`lab.py`) is asked, in order of its value; each with the budget, seeds and measure that stood
before its first run."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """What is to be known, and how it will be told, fixed before the first run.

    Attributes:
        name: of its folder and rows. asks: in a sentence.
        task: of `TASKS`. options: of fine-tuning, as they are typed; {data} is the folder `--data`.
        inits: name → the method and its options as they are typed, such as "pcrlv2 --lr 0.05"; the first is "random",
            with none.
        percents: of the labels.
        rates: of learning, and lengths, values of the option `length`, that are searched for every init alike.
        trials: pairs with each pre-training. tuning: init → further options of its fine-tuning, such as what is loaded.
        searched: seeds of each point of the search. pretrained: seeds of each pre-training.
        features: whether frozen features are judged too, of random weights with as many seeds.
    """

    name: str
    asks: str
    task: str
    options: str
    inits: dict[str, str]
    percents: tuple[float, ...]
    rates: tuple[float, ...]
    length: str
    lengths: tuple[int, ...]
    trials: int
    tuning: dict[str, str] = field(default_factory=dict)
    searched: int = 3
    pretrained: int = 1
    features: bool = False


HIPPOCAMPI = (  # 4 and 16 of 112 volumes are 3.6 and 14.3 %; front and back tell the labels apart, so y is not mirrored
    "--data {data}/hippocampus --dataset folder --d 3 --arch unet3d_quarter --patch 32 32 32 --b 2 --patches 2 "
    "--mirror xz --amp --workers 0"
)
CUBES = "--b 8 --cube-size 32 32 32"
GENESIS = f"genesis {CUBES} --epochs 90"
PCRLV2 = f"pcrlv2 {CUBES} --local-cube-size 16 16 16 --optimizer adamw --lr 1e-3 --epochs 45"
PCRLV2_20 = f"{PCRLV2} --restoration-weight 20"
PCRL = f"pcrl {CUBES} --queue 192 --optimizer adamw --lr 1e-3 --epochs 25"
WHOLE = "--load encoder+decoder"
NATIVE = "--crop-mm 32 32 32"  # as patches are: of 1 mm a voxel

RADIOGRAPHS = (
    "--data {data}/pneumoniamnist.npz --dataset pneumoniamnist --arch resnet18 --image-size 64 --amp --workers 0"
)
MAGICAL = "magical -b 64 --epochs 4 --lr 1e-3 --patience 0"
CONTRAST = "-b 64 --optimizer sgd --lr 0.03 --weight-decay 1e-4 --schedule cosine --warmup-epochs 1"
QUEUE = f"{CONTRAST} --queue 1024"  # less than a third of the images: C2L and PCRL put three keys of each there

QUESTIONS: list[Question] = [
    Question(
        name="hippocampi_steady",
        asks="What makes fine-tuning with four volumes steady, from random weights?",
        task="segmentation",
        options=HIPPOCAMPI,
        inits={"random": "", "mirrored_xyz": "", "instance": "", "group": ""},
        tuning={"mirrored_xyz": "--mirror xyz", "instance": "--norm instance", "group": "--norm group"},
        percents=(3.6,), rates=(1.5e-3,), length="--epochs", lengths=(6,), searched=3, trials=0,
    ),
    Question(
        name="hippocampi_baseline",
        asks="Which rate and length are best for random weights, where longer is no better?",
        task="segmentation",
        options=f"{HIPPOCAMPI} --epoch-steps 100",
        inits={"random": ""},
        percents=(3.6,), rates=(1.5e-3, 7e-4, 3e-4, 3e-3), length="--epochs", lengths=(6, 12), searched=3, trials=0,
    ),
    Question(
        name="hippocampi_load",
        asks="What is worth loading, after 15 to 26 minutes of one core each: the encoder, or the decoder, too?",
        task="segmentation",
        options=HIPPOCAMPI,
        inits={
            "random": "", "pcrlv2_20": PCRLV2_20, "genesis_rising": f"{GENESIS} --falling 0",
            "mae": f"mae {CUBES} --epochs 90", "pcrl": PCRL, "pcrlv2_20_encoder": PCRLV2_20, "pcrlv2": PCRLV2,
            "genesis": GENESIS,
        },
        tuning={"genesis": WHOLE, "genesis_rising": WHOLE, "pcrlv2_20": WHOLE, "pcrlv2": WHOLE, "pcrl": WHOLE},
        percents=(3.6,), rates=(1.5e-3, 5e-3), length="--epochs", lengths=(6,), searched=3, trials=0,
    ),
    Question(
        name="hippocampi_scale",
        asks="Is pre-training worth more where its cubes have the fine-tuning's millimetres a voxel?",
        task="segmentation",
        options=HIPPOCAMPI,
        inits={
            "random": "", "mae": f"mae {CUBES} --epochs 90 --mirror xz {NATIVE}", "pcrlv2_20": f"{PCRLV2_20} {NATIVE}",
            "pcrlv2_20_whole": f"{PCRLV2_20} {NATIVE}",
            "genesis_rising": f"{GENESIS} --falling 0 --mirror xz {NATIVE}",
        },
        tuning={"genesis_rising": WHOLE, "pcrlv2_20_whole": WHOLE},
        percents=(3.6,), rates=(1.5e-3, 5e-3), length="--epochs", lengths=(6,), searched=6, trials=0,
    ),
    Question(
        name="magical_causes",
        asks="Which one change makes MAGICAL's frozen features better than random ones, in four passes of the images?",
        task="classification",
        options=RADIOGRAPHS,
        inits={
            "random": "", "magical": MAGICAL, "crops": f"{MAGICAL} --crop-scale 0.2",
            "no_skips": f"{MAGICAL} --no-skips", "grid_8": f"{MAGICAL} --grid 8",
            "projector": f"{MAGICAL} --projector norm",
            "statistics": f"{MAGICAL} --no-joint-norm", "rate": f"{MAGICAL} --lr 2e-4",
            "temperature": f"{MAGICAL} --temperature 0.5", "batch": f"{MAGICAL} -b 256",
        },
        percents=(1,), rates=(), length="--epochs", lengths=(), trials=0, pretrained=3, features=True,
    ),
    Question(
        name="pneumonia",
        asks="What is each method worth on radiographs, after an hour of one core?",
        task="classification",
        options=f"{RADIOGRAPHS} --b 32 --patience 0 --epoch-steps 20",
        inits={
            "random": "", "mae": "mae -b 64 --epochs 80 --lr 1e-3",
            "pcrlv2": "pcrlv2 -b 64 --local-size 32 --epochs 28 --lr 0.05",
            "genesis": "genesis -b 64 --epochs 55 --lr 1e-3",
            "magical": "magical -b 64 --epochs 48 --lr 1e-3 --patience 0",
            "moco": f"moco --version 2 {QUEUE} --epochs 120",
            "c2l": f"c2l {QUEUE} --epochs 65", "pcrl": f"pcrl {QUEUE} --epochs 18",
            "simclr": f"simclr {CONTRAST} --epochs 100", "byol": f"byol {CONTRAST} --epochs 70",
            "densecl": f"densecl {QUEUE} --epochs 100", "pcl": f"pcl {QUEUE} --epochs 85 --warm-up 20",
            "concl": f"concl {QUEUE} --epochs 100 --warm-up 20 --concepts 4",
            "insdis": f"insdis {CONTRAST} --negatives 1024 --epochs 160",
        },
        percents=(1, 10), rates=(2e-4, 5e-4, 1e-3, 3e-3), length="--epochs", lengths=(5, 15), searched=2, trials=5,
        features=True,
    ),
]  # fmt: skip
