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


QUESTIONS: list[Question] = []
