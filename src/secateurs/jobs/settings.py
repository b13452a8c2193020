"""What a job is asked to do, complete, so that ``config.json`` can hold it and a resume can check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from secateurs.errors import BudgetError, DataError, RunError, TrainingError, UnknownNameError
from secateurs.graph.groups import Kind
from secateurs.jobs.targets import check_target
from secateurs.planning.limits import check_least
from secateurs.planning.schedules import PACES
from secateurs.recovery.recipe import Recipe
from secateurs.recovery.repair import WAYS

if TYPE_CHECKING:
    from secateurs.data import DataSource

SELECTIONS = ("greedy", "independent", "particles")
ALLOCATIONS = ("error", "none")
STOPS = ("accuracy-drop",)
RECONSTRUCTION_IMAGES = 2000  # five times as many give a fifth of a point at most, see docs/results.md


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which images, and in what form; a pruned run takes over those of the run that it prunes.

    Attributes:
        path: The folder, or ``None`` for the bundled digits.
        image_size: Pixels of the square images; the data's usual size if ``None``.
        channels: 1 or 3; the data's usual number if ``None``.
        mean: Subtracted from each channel in [0, 1]; the data's usual values if ``None``.
        std: What each channel is divided by then; the data's usual values if ``None``.
        val_share: The share of the training images held out for validation.
        seed: What the choice of the validation images follows from.
        augment: Whether training images vary at random.
    """

    path: str | None = None
    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    val_share: float = 0.1
    seed: int = 0
    augment: bool = True

    def load(self) -> DataSource:
        """The sets that these settings describe.

        Raises:
            DataError: See :func:`secateurs.data.load_data`.
        """
        from secateurs.data import load_data

        return load_data(**asdict(self))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> DataSettings:
        """The settings that a run's configuration holds."""
        pairs = {key: tuple(facts[key]) for key in ("mean", "std") if facts.get(key) is not None}
        return cls(**{**facts, **pairs})

    def at(self, path: str | None) -> DataSettings:
        """The same form of images from another folder; unchanged for ``None``."""
        return self if path is None else replace(self, path=absolute_data(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSettings:
    """What every job has.

    Attributes:
        batch_size: Images in a batch.
        workers: Processes that read images ahead.
        threads: Of this process; as many as torch takes if ``None``.
        seed: What every random number of the job follows from.
    """

    batch_size: int = 32
    workers: int = 0
    threads: int | None = None
    seed: int = 0

    def _check(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"`batch_size >= 1` must hold, got batch_size={self.batch_size}")
        if self.workers < 0:
            raise DataError(f"`workers >= 0` must hold, got workers={self.workers}")
        if self.threads is not None and self.threads < 1:
            raise RunError(f"`threads >= 1` must hold, got threads={self.threads}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings(WorkSettings):
    """What every job has that trains.

    Attributes:
        recipe: How to train; its seed is replaced by one that follows from ``seed``.
    """

    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings(JobSettings):
    """What :func:`secateurs.jobs.train_job` is asked to do.

    Attributes:
        data: The images.
        model: An architecture, such as ``"torchvision:vgg16"``.
        head: ``"keep"``, ``"linear"`` or ``"article"``.
        weights: A name of torchvision's, a ``.pth`` or ``.safetensors`` file, or ``"none"``.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: str = "secateurs:vgg-digits"
    head: str = "keep"
    weights: str = "none"

    def __post_init__(self) -> None:
        self._check()
        check_untaught(self.recipe, "training")

    def resolved(self) -> Self:
        """The same with paths that mean the same from every folder."""
        path = None if self.data.path is None else absolute_data(self.data.path)
        weights = str(Path(self.weights).resolve()) if Path(self.weights).is_file() else self.weights
        return replace(self, data=replace(self.data, path=path), weights=weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings(JobSettings):
    """What :func:`secateurs.jobs.prune_job` is asked to do: how much leaves, and how.

    Attributes:
        source: The run directory of the trained model.
        data: Another folder of images; those that the model was trained on if ``None``.
        remove: Units that leave in each iteration. Either this or ``target``.
        target: What remains after the last iteration: ``("macs", 0.3)``; also ``"params"``, ``"bytes"``,
            ``"units"`` and ``"latency"``, the time of one image on the job's device, which is measured. Of
            ``"macs"``, ``"params"`` and ``"bytes"`` a number above 1 is what there may be at most, as
            ``("bytes", 4e6)``, and of ``"latency_ms"`` any number.
        iterations: Rounds of rank, cut and fine-tune. The shares on the way to a target are spaced
            geometrically, so that each round takes the same share of what the one before left.
        criterion: The name of a criterion; if ``None``, ``"reconstruction"``, and where ``remove`` or
            ``normalization`` is given and images have labels, ``"taylor"``. See `settled` in `jobs.cuts` for
            networks of which reconstruction ranks too little.
        scope: ``"global"`` or ``"local"``.
        round_to: What the number of units that a group keeps is a multiple of.
        kinds: Kinds of groups to cut; by default filters alone with ``remove``, every kind with ``target``.
        skip: Glob patterns of groups to leave alone.
        shares: For glob patterns of groups the share of their units that remains after the last iteration;
            they may stand in place of ``remove`` and ``target``.
        min_units: What every group keeps at least: a number of units, or a share of its own.
        selection: Which units leave where the ranking has decided how many: ``"independent"``,
            ``"greedy"`` or ``"particles"``.
        allocation: ``"error"`` spends the budget where the error is least for what that saves, by the error
            curves of the criterion, or of ``"reconstruction"`` where it has none; ``"none"`` by ``scope``; if
            ``None``, ``"error"`` where neither ``criterion`` nor a local scope is given and the criterion
            comes to ``"reconstruction"``, else ``"none"``.
        normalization: Of the importances in each group; the criterion's own if ``None``.
        rank_images: Training images to rank on; if ``None`` all, but for ``"reconstruction"`` 2,000.
        pace: How ``target`` and ``shares`` are spread over the iterations: ``"geometric"``, ``"linear"``,
            ``"cubic"`` or ``"one-shot"``, which is one iteration; geometric if ``None``.
        until: ``("accuracy-drop", 0.01)``: a cut after which the validation accuracy is lower than the first
            one by more than this is undone, and is the last.
        repair: What heals each cut before the fine-tune, as :func:`secateurs.recovery.repair` takes it;
            ``"none"`` for nothing.
        repair_images: Training images that the repair looks at; all if ``None`` or if there are fewer.
        final_epochs: Epochs of the longer fine-tune at the end; one and a half times ``recipe.epochs``
            if ``None``.
    """

    source: str
    data: str | None = None
    remove: int | None = None
    target: tuple[str, float] | None = None
    iterations: int = 5
    criterion: str | None = None
    scope: str = "global"
    round_to: int = 1
    kinds: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    shares: Mapping[str, float] | None = None
    min_units: int | float = 1
    selection: str = "independent"
    allocation: str | None = None
    normalization: str | None = None
    rank_images: int | None = None
    pace: str | None = None
    until: tuple[str, float] | None = None
    repair: str = "reconstruct"
    repair_images: int | None = 2000
    final_epochs: int | None = None

    def __post_init__(self) -> None:
        self._check()
        amounts = [value for value in (self.remove, self.target) if value is not None]
        if len(amounts) > 1 or not (amounts or self.shares):
            given = f"remove={self.remove}, target={self.target}"
            raise BudgetError(f"exactly one of remove and target must be given, or shares, got {given}")
        if self.target is not None:
            check_target(self.target)
        for name, value, least in (
            ("remove", self.remove, 1),
            ("iterations", self.iterations, 1),
            ("round_to", self.round_to, 1),
            ("rank_images", self.rank_images, 1),
            ("repair_images", self.repair_images, 1),
            ("final_epochs", self.final_epochs, 0),
        ):
            if value is not None and value < least:
                raise BudgetError(f"`{name} >= {least}` must hold, got {name}={value}")
        check_kinds(self.kinds)
        check_least(self.min_units)
        if self.scope not in ("global", "local"):
            raise BudgetError(f"scope is 'global' or 'local', got {self.scope!r}")
        for kind, given, known in (
            ("selection", self.selection, SELECTIONS),
            ("allocation", self.usual_allocation, ALLOCATIONS),
            ("pace", self.usual_pace, PACES),
            ("repair", self.repair, WAYS),
            ("stopping rule", (self.until or STOPS)[0], STOPS),
        ):
            if given not in known:
                raise UnknownNameError(kind, str(given), known)
        if self.until is not None and not 0 <= self.until[1] < 1:
            rule, drop = self.until
            raise BudgetError(f"`0 <= {rule} < 1` must hold, got {rule}={drop}", fix=f"--until {rule}=0.01")
        if self.pace is not None and self.remove is not None:
            raise BudgetError(
                f"pace={self.pace!r} has no effect: remove={self.remove} is the same in each iteration"
            )
        if self.pace == "one-shot" and self.iterations != 1:
            raise BudgetError(
                f"one-shot is one iteration, got iterations={self.iterations}", fix="--iterations 1"
            )

    @property
    def usual_criterion(self) -> str:
        """The criterion, also where none is given."""
        return self.criterion or "taylor"

    @property
    def usual_allocation(self) -> str:
        """The allocation, also where none is given."""
        return self.allocation or "none"

    def for_images(self, *, are_labelled: bool) -> Self:
        """The same with the defaults that hang on whether the images have labels written out.

        Example:
            >>> settings = PruneSettings(source="runs/vgg", remove=512)
            >>> [settings.for_images(are_labelled=labelled).criterion for labelled in (True, False)]
            ['taylor', 'reconstruction']
        """
        criterion, allocation, images = self.usual_criterion, self.allocation, self.rank_images
        is_usual = self.remove is None and self.normalization is None
        if self.criterion is None and (is_usual or not are_labelled):
            criterion = "reconstruction"
            allocation = allocation or ("error" if self.scope == "global" else "none")
        if images is None and criterion == "reconstruction":
            images = RECONSTRUCTION_IMAGES
        recipe = recipe_for_images(self.recipe, are_labelled=are_labelled)
        return replace(
            self, criterion=criterion, allocation=allocation or "none", rank_images=images, recipe=recipe
        )

    @property
    def usual_pace(self) -> str:
        """The pace, also where none is given."""
        return self.pace or "geometric"

    @property
    def last_epochs(self) -> int:
        """Epochs of the fine-tune at the end."""
        return self.recipe.epochs * 3 // 2 if self.final_epochs is None else self.final_epochs

    @property
    def cut_kinds(self) -> tuple[str, ...] | None:
        """Kinds of groups that may be cut; ``None`` for every kind but ``"position"``."""
        return ("channel",) if self.kinds is None and self.remove is not None else self.kinds

    def resolved(self) -> Self:
        """The same with paths that mean the same from every folder."""
        data = None if self.data is None else absolute_data(self.data)
        return replace(self, source=str(Path(self.source).resolve()), data=data)


def recipe_for_images(recipe: Recipe, *, are_labelled: bool) -> Recipe:
    """How a cut network is trained: on images without labels the original teaches, unless told otherwise."""
    return recipe if recipe.distill is not None else replace(recipe, distill=0.0 if are_labelled else 1.0)


def check_kinds(kinds: tuple[str, ...] | None) -> None:
    """Refuse a kind of groups that there is not.

    Raises:
        UnknownNameError: One of ``kinds`` is no kind.
    """
    for kind in kinds or ():
        if kind not in get_args(Kind):
            raise UnknownNameError("kind of groups", kind, get_args(Kind))


def check_untaught(recipe: Recipe, what: str) -> None:
    """Refuse a share of the loss from a teacher where there is none.

    Raises:
        TrainingError: The recipe asks for one.
    """
    for name, share in (("distill", recipe.distill), ("distill_features", recipe.distill_features)):
        if share:
            raise TrainingError(f"{what} has no teacher, so {name} must be 0, got {share}")


def absolute_data(path: str) -> str:
    """A data path that means the same from every folder; the name ``"digits"`` stays."""
    return path if path == "digits" else str(Path(path).resolve())
