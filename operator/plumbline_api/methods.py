"""The training methods: what each stage type reads besides the parameters that all share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from plumbline_api.base import Contract, Name
from plumbline_api.online import ONLINE_LEARNING_RATES, ONLINE_STAGES, BestOfN
from plumbline_api.training import Training, TrainingStage, TunedStage


class Rehearsal(Contract):
    """Rows of another dataset among those of the stage, so that what was learned from them stays."""

    dataset: Name
    """Dataset with a prompt and an answer, or raw text, whose training rows are mixed in."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the rows of every step that come from it."""


class Ewc(Contract):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): hold weights that matter to another dataset."""

    dataset: Name
    """Dataset with a prompt and an answer, or raw text, that must not be forgotten."""
    coefficient: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Strength λ of ½λ·ΣF·Δ²; F is per token, so that 1 weighs as much as the dataset's own loss would."""
    rows: Annotated[int, Field(ge=1, le=1000000)] = 256
    """Rows, drawn by the seed, from which the Fisher diagonal F is taken at the stage's start."""


def least_mixed(own: int, shares: Sequence[float]) -> int:
    """Rows that a step needs for `own` of the stage's own among them, where other datasets have shares of all rows.

    Every dataset's rows stand evenly in an epoch, so that of a stretch of g rows at least s·(g − k) − (1 − s) are the
    stage's own: k other datasets, own share s.
    """
    if not shares:
        return own
    share = 1.0 - sum(shares)
    return math.floor(len(shares) + (own - share) / share + 1e-9) + 1


class Kl(Contract):
    """Hold the whole distribution of each token near that of a reference."""

    coefficient: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Factor on the mean of KL(reference ‖ policy) over the tokens that carry loss: all answers' where there are several."""
    reference: Name | None = None
    """Stage whose policy is the reference. Absent: the policy at this stage's start, or baseModel."""
    base_model: bool = False
    """Take spec.model as the reference."""

    @property
    def is_start(self) -> bool:
        """Whether the reference is the policy at the stage's start."""
        return self.reference is None and not self.base_model

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if self.reference is not None and self.base_model:
            raise ValueError("reference names a stage and baseModel takes spec.model; leave one of the two out")
        return self


class PolicyStage(TrainingStage):
    """Fields of the stages that train a policy."""

    ewc: Ewc | None = None
    """Elastic weight consolidation."""
    rehearsal: Annotated[list[Rehearsal], Field(min_length=1, max_length=8)] | None = None
    """Other datasets to mix in, against forgetting; an epoch remains a pass over `dataset`."""

    @model_validator(mode="after")
    def _can_hold(self) -> Self:
        if self.ewc is not None and self.lora is not None and self.lora.dora:
            raise ValueError(
                "ewc holds products of two factors, and lora.dora changes weights by more than one. "
                "Leave one of the two out"
            )
        if self.ewc is not None and self.lora is not None and self.lora.quantization is not None:
            raise ValueError(
                "ewc takes gradients of the weights themselves, and lora.quantization leaves none. "
                "Leave one of the two out, or hold the weights with training.l2sp"
            )
        shares = sum(item.share for item in self.rehearsal or ())
        if shares >= 1:
            raise ValueError(
                f"rehearsal: the shares sum to {shares:g} and leave no room for dataset; keep them below 1"
            )
        return self


class KlStage(PolicyStage):
    """Fields of the stages whose own loss holds the policy near no reference."""

    kl: Kl | None = None
    """Hold the answers near the policy at the stage's start, which needs lora, or near another policy."""

    @property
    def kl_coefficient(self) -> float:
        """The coefficient in force, 0 without kl."""
        return 0.0 if self.kl is None else self.kl.coefficient

    @model_validator(mode="after")
    def _has_reference(self) -> Self:
        if self.kl is not None and self.kl.is_start and self.lora is None:
            raise ValueError(
                "kl compares with the stage's start by switching the adapter off; set lora, name the policy to compare "
                "with (kl.reference, kl.baseModel), or hold the weights with ewc or training.l2sp instead"
            )
        if self.kl is not None and self.kl.is_start and self.lora is not None and self.lora.modules_to_save:
            raise ValueError(
                "kl compares with the stage's start by switching the adapter off, and lora.modulesToSave are trained "
                "beside it. Leave one of the two out, name the policy to compare with (kl.reference, kl.baseModel), "
                "or hold the weights with ewc or training.l2sp"
            )
        return self


class LikelihoodStage(KlStage):
    """Fields of the stages that raise the likelihood of given tokens; rehearsed ones count like the stage's own."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share ε of each label spread over the vocabulary. Absent: 0."""

    drops_at_random: ClassVar[bool] = True


class AnswersStage(PolicyStage):
    """Fields of the stages that compare or weigh answers, whose rehearsed rows have a loss of their own."""

    rehearsal_weight: Annotated[float, Field(gt=0, le=100)] | None = None
    """Weight γ of the mean of −log p over the rehearsed tokens of a step, beside the stage's own loss. Absent: 1."""

    @property
    def rehearsed_weight(self) -> float:
        """The weight in force."""
        return 1.0 if self.rehearsal_weight is None else self.rehearsal_weight

    @property
    def step_needs(self) -> int:
        """Rows that a step needs, so that enough of them are the stage's own."""
        return least_mixed(self.least_rows, [item.share for item in self.rehearsal or ()])

    @model_validator(mode="after")
    def _can_rehearse(self) -> Self:
        if self.rehearsal_weight is not None and self.rehearsal is None:
            raise ValueError(
                "rehearsalWeight weighs the rows that rehearsal mixes in, and there are none. "
                "Name their dataset in rehearsal, or leave rehearsalWeight out"
            )
        shares = [item.share for item in self.rehearsal or ()]
        needed = self.step_needs
        if self.training.global_batch < needed:
            raise ValueError(
                f"rehearsal takes {sum(shares):g} of the rows of a step, and of training.globalBatch: "
                f"{self.training.global_batch} too few may be left of dataset. Take at least {needed}, or a lower share"
            )
        return self


class Pretrain(LikelihoodStage):
    """Continued pre-training: next-token loss on every token of raw text."""

    training: Training = Training(max_length=2048)
    """Optimisation parameters."""


class Sft(LikelihoodStage):
    """Supervised fine-tuning on prompts and answers."""

    loss_on: Literal["completion", "all", "assistant"] = "completion"
    """Tokens that carry loss: those of the last answer, all tokens, or every assistant turn."""


class RewardModel(TrainingStage):
    """Reward model: the policy with a scalar head, trained on which answer is better (Bradley-Terry; Plackett-Luce on ranked rows)."""

    heads: Annotated[int, Field(ge=1, le=32)] = 1
    """Heads of an ensemble on one backbone, each with a start of its own."""
    centring: Annotated[float, Field(gt=0, le=100)] | None = None
    """Weight c of c·(r_w + r_l)², which keeps rewards around zero; 0.01 is usual. Absent: none."""


DpoLoss = Literal["sigmoid", "robust", "ipo", "ipoSum", "hinge", "exo", "nca", "apoZero", "apoDown"]
SMOOTHED_LOSSES = frozenset({"sigmoid", "robust", "exo"})
"""Losses of dpo that label smoothing changes."""
EXO_SMOOTHING = 1e-3
"""Label smoothing of exo where none is set."""
Beta = Annotated[float, Field(gt=0, le=100)]
SftWeight = Annotated[float, Field(ge=0, le=100)]


class Dpo(AnswersStage):
    """Direct preference optimisation (Rafailov et al. 2023) and its relatives with a reference."""

    beta: Beta = 0.1
    """Strength of the pull towards the reference; of ipo and ipoSum the paper's τ."""
    loss: DpoLoss = "sigmoid"
    """Form of the preference loss. ipo takes means over tokens, ipoSum sums; apoZero suits chosen answers better than the policy's own, apoDown worse ones."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Share of pairs whose answers are believed to be swapped: with sigmoid the conservative loss, with robust the unbiased one, with exo the target. Absent: 0, with exo 0.001."""
    length_normalized: bool = False
    """Take log-ratios as means over the tokens of an answer instead of sums."""
    sft_weight: SftWeight = 0.0
    """Weight α of the likelihood of chosen answers (RPO): plus α times the mean of −log p over the tokens of each."""
    reference: Name | None = None
    """Stage whose policy is the reference. Absent: the policy at the start of this stage."""

    @field_validator("label_smoothing")
    @classmethod
    def _check_label_smoothing(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss = info.data.get("loss")
        if value and loss is not None and loss not in SMOOTHED_LOSSES:
            fits = ", ".join(sorted(SMOOTHED_LOSSES))
            raise ValueError(
                f"{value} with loss {loss}, which has no label smoothing; leave it out, or take loss {fits}"
            )
        if loss == "exo" and value == 0:
            raise ValueError(f"0 with loss exo, which needs a share above 0; leave it out for {EXO_SMOOTHING}")
        return value

    @field_validator("length_normalized")
    @classmethod
    def _check_length_normalized(cls, value: bool, info: ValidationInfo) -> bool:
        loss = info.data.get("loss")
        if value and loss == "ipo":
            raise ValueError("true with loss ipo, which takes means over tokens by itself; leave it out")
        if value and loss == "ipoSum":
            raise ValueError("true with loss ipoSum, which takes sums; leave it out, or take loss ipo for means")
        return value

    def model_post_init(self, _context: Any) -> None:
        """Refuse a loss that lacks what it is made of."""
        if self.loss == "robust" and self.label_smoothing is None:
            raise ValueError("loss robust needs labelSmoothing, the share of pairs believed to be swapped, such as 0.1")

    @property
    def takes_label_smoothing(self) -> bool:
        """Whether the loss is a function of it."""
        return self.loss in SMOOTHED_LOSSES

    @property
    def smoothing(self) -> float:
        """The label smoothing in force."""
        if self.label_smoothing is None:
            return EXO_SMOOTHING if self.loss == "exo" else 0.0
        return self.label_smoothing

    @property
    def uses_means(self) -> bool:
        """Whether log-ratios are means over tokens."""
        return self.length_normalized or self.loss == "ipo"


class Orpo(KlStage, AnswersStage):
    """Odds-ratio preference optimisation (Hong et al. 2024): likelihood plus beta times an odds-ratio loss, no reference."""

    beta: Beta = 0.1
    """Weight of the odds-ratio loss, the paper's λ."""
    sft_on: Literal["all", "completion"] = "all"
    """Tokens of the likelihood: prompt and chosen answer as in the authors' code, or the answer alone."""


class Simpo(KlStage, AnswersStage):
    """Simple preference optimisation (Meng et al. 2024): a margin between mean log-probabilities, no reference."""

    beta: Beta = 2.0
    """Scale of the rewards: beta times the mean log-probability of an answer's tokens."""
    gamma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Margin by which the chosen answer's reward should exceed the rejected one's."""
    sft_weight: SftWeight = 0.0
    """Weight of the likelihood of chosen answers, the mean of −log p over the tokens of each."""


class Cpo(KlStage, AnswersStage):
    """Contrastive preference optimisation (Xu et al. 2024): the loss of dpo without a reference, plus likelihood."""

    beta: Beta = 0.1
    """Scale of the difference of log-probabilities."""
    sft_weight: SftWeight = 1.0
    """Weight of the likelihood of chosen answers, the mean of −log p over the tokens of each."""


class Rrhf(KlStage, AnswersStage):
    """Rank responses (Yuan et al. 2023): mean log-probabilities in the order of the ranks, plus likelihood of the best."""

    sft_weight: SftWeight = 1.0
    """Weight of the likelihood of best answers, the mean of −log p over the tokens of each."""


class KtoTraining(Training):
    """Optimisation parameters; the reference point needs a batch of at least two rows."""

    global_batch: Annotated[int, Field(ge=2, le=65536)] = 16
    """Rows (or pairs) per optimizer step, over all ranks and micro-batches; the reference point is their mean."""


class Kto(AnswersStage):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) on answers labelled desirable or not, or on pairs."""

    least_rows: ClassVar[int] = 2

    training: KtoTraining = KtoTraining()
    """Optimisation parameters."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Strength of the pull towards the reference."""
    desirable_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Weight λ_D of desirable answers."""
    undesirable_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Weight λ_U of undesirable answers. λ_D·n_D / (λ_U·n_U) is best between 1 and 4/3."""
    reference: Name | None = None
    """Stage whose policy is the reference. Absent: the policy at the start of this stage."""


class Awr(KlStage, AnswersStage):
    """Advantage-weighted regression (Peng et al. 2019): answers by how far they score above the baseline V."""

    beta: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """β of an answer's weight exp((score − V)/β): large ones imitate all answers alike, small ones the best only."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """V is this expectile of the scores of the prompt's answers, or of the dataset's where a prompt has one; 0.5 is the mean, more is nearer to the best (Kostrikov et al. 2021)."""
    weight_clip: Annotated[float, Field(ge=1, le=1e6)] = 20.0
    """Largest weight."""
    score_scale: Literal["std", "none"] = "std"
    """std: score − V is divided by its root mean square over the training rows, so that β has no unit."""


GIVEN_ROWS: dict[str, type[TrainingStage]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "rewardModel": RewardModel,
    "dpo": Dpo,
    "kto": Kto,
    "orpo": Orpo,
    "simpo": Simpo,
    "cpo": Cpo,
    "rrhf": Rrhf,
    "awr": Awr,
}
"""Parameters of the stages that train on rows of a dataset, by stage type."""
TRAINING_STAGES: dict[str, type[TunedStage]] = {**GIVEN_ROWS, "bestOfN": BestOfN, **ONLINE_STAGES}
"""Parameters of the stages that train, by stage type."""

DEFAULT_LEARNING_RATES: dict[str, tuple[float, float]] = {
    "pretrain": (2e-4, 2e-5),
    "sft": (2e-4, 2e-5),
    "rewardModel": (1e-4, 1e-5),
    "dpo": (5e-6, 1e-6),
    "kto": (5e-6, 1e-6),
    "orpo": (5e-6, 1e-6),
    "simpo": (5e-6, 1e-6),
    "cpo": (5e-6, 1e-6),
    "rrhf": (5e-6, 1e-6),
    "awr": (2e-4, 2e-5),
    "bestOfN": (2e-4, 2e-5),
    **dict.fromkeys(ONLINE_STAGES, ONLINE_LEARNING_RATES),
}
"""Peak learning rate with LoRA and without, by stage type."""

_REWARDS = ("evalLoss", "evalRewardAccuracy", "evalRewardMargin")
_PAIRS = (*_REWARDS, "evalRewardChosen", "evalRewardRejected", "evalLogpsChosen", "evalLogpsRejected", "evalSftLoss")
EVALUATION_FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pretrain", "sft", "bestOfN"), ("evalLoss",)),
    "rewardModel": (*_REWARDS, "evalRewardMean"),
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo"), _PAIRS),
    "kto": (*_REWARDS, "evalKl", "evalRewardDesirable", "evalRewardUndesirable"),
    "rrhf": (*_REWARDS, "evalRankingLoss", "evalSftLoss"),
    "awr": ("evalLoss", "evalSftLoss", "evalWeight", "evalClippedWeights"),
}
"""Figures of a stage's evaluations, by stage type; evalSftLoss only where the loss has a likelihood."""
