"""What a user types: one frozen tree of settings, read strictly from TOML.

Every key has its type, its range and one sentence in its annotation; the error messages and
``privfed run --print-config`` are made from these.
"""

from typing import Annotated, get_args

import msgspec
from msgspec import Meta

from privfed.privacy.events import MAX_RECORDS, NoiseSite, PrivacyUnit
from privfed.privacy.units import PatientSampling

from .data.arrays import Arrays
from .data.queries import Query
from .data.sources import BreastCancer
from .data.tables import Table
from .methods import Method, Reptile, Weighted
from .methods.server import Plain, Server
from .models import MLP, Network
from .tasks import Classification, Cox, Rating, Regression, Survival
from .transfer import Everything, Transfer

AGGREGATIONS = ("masked", "homomorphic", "plain")


class Section(msgspec.Struct, frozen=True):
    """A table of the configuration file."""


class Privacy(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[privacy]"""

    unit: Annotated[
        PrivacyUnit,
        Meta(description="whose participation is hidden: record, patient, client (a whole site), or none (no claim)"),
    ] = PrivacyUnit.RECORD
    noise: Annotated[
        NoiseSite,
        Meta(
            description="who adds the noise: local, each site enough for itself; distributed, each a share of what the "
            "secure sum needs; central, the server (client only)"
        ),
    ] = NoiseSite.LOCAL
    target_epsilon: Annotated[
        float,
        Meta(gt=0, description="each site's budget (inf: none); calibrates the noise unless noise_multiplier is given"),
    ] = 4.0
    noise_multiplier: Annotated[
        Annotated[float, Meta(gt=0, le=1e6)] | None,
        Meta(description="noise standard deviation / clipping norm, instead of a calibrated one"),
    ] = None
    delta: Annotated[float, Meta(gt=0, lt=1, description="δ; far below 1 / number of records of a site")] = 1e-5
    max_grad_norm: Annotated[
        float, Meta(ge=1e-6, le=1e6, description="C, largest L2 norm of a record's gradient, or of a patient's sum")
    ] = 1.0
    max_update_norm: Annotated[
        float, Meta(ge=1e-6, le=1e6, description="unit = client: C, largest L2 norm of a site's whole update")
    ] = 1.0
    clip: Annotated[
        str,
        Meta(
            pattern="^(fixed|adaptive)$",
            description='unit = client: "fixed", C is max_update_norm; "adaptive", it starts there and follows a '
            "quantile of the sites' norms, by a noised count that is part of the round's cost (Andrew et al. 2021)",
        ),
    ] = "fixed"
    clip_quantile: Annotated[
        float, Meta(gt=0, lt=1, description="clip = adaptive: share of the sites whose updates shall be shorter than C")
    ] = 0.5
    clip_rate: Annotated[
        float, Meta(gt=0, le=5, description="clip = adaptive: how fast; C changes by a factor of e^(±rate) at most")
    ] = 0.2
    schedule: Annotated[
        str,
        Meta(
            pattern="^(constant|spend)$",
            description='noise in shares: "constant", every round is planned for the fewest sites in a sum; "spend", '
            "what a sum of more sites does not need goes to the other rounds; needs aggregation.kind = 'masked'",
        ),
    ] = "constant"
    sample_rate: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="q, public: the chance of a record or patient to be drawn; default 0.5, distributed 1"),
    ] = None
    sampling: Annotated[
        PatientSampling,
        Meta(description='unit = patient: "patient" draws whole patients, "record" records, max_records of a patient'),
    ] = "patient"
    max_records: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_RECORDS)] | None,
        Meta(description='sampling = "record": the most records of one patient that are used'),
    ] = None
    colluders: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)] | None,
        Meta(
            description="distributed: sites whose shares of noise the server may know and target_epsilon still holds; "
            "default as many as the masks tolerate, 1 when encrypted"
        ),
    ] = None
    expected_batch_size: Annotated[
        float,
        Meta(ge=1e-3, le=1e9, description="public denominator of a site's mean gradient; never computed from the data"),
    ] = 40.0
    standardise_epsilon: Annotated[
        Annotated[float, Meta(gt=0, le=1e3)] | None,
        Meta(
            description="part of target_epsilon for a noised mean and deviation of every input, by which all sites "
            "standardise; default: inputs stay as the public ranges scale them"
        ),
    ] = None
    insecure_seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="noise anyone can recompute, for reproducing a study; voids the privacy claim"),
    ] = None

    @property
    def rate(self) -> float:
        """q."""
        if self.sample_rate is not None:
            return self.sample_rate
        return 1.0 if self.noise is NoiseSite.DISTRIBUTED else 0.5


class SideNoise(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Noise multipliers of what is released beside the updates; 0 where nothing is."""

    figures: Annotated[float, Meta(ge=0)] = 0.0
    inputs: Annotated[float, Meta(ge=0)] = 0.0


class Aggregation(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[aggregation]"""

    kind: Annotated[
        str,
        Meta(
            pattern=f"^({'|'.join(AGGREGATIONS)})$",
            description='"masked" (the server sees the sum), "homomorphic" (so too, with a key holder), "plain"',
        ),
    ] = "masked"
    threshold: Annotated[
        Annotated[int, Meta(ge=2, le=511)] | None,
        Meta(description="shares needed to recover a dropout; default 2n/3 + 1, at most n − 1 from four sites up"),
    ] = None
    minimum_cohort: Annotated[
        Annotated[int, Meta(ge=2, le=100_000)] | None,
        Meta(description="fewest sites whose sum may be released; default max(3, threshold)"),
    ] = None
    colluders: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)] | None,
        Meta(description="sites that may collude with the server; default 2 threshold − sites − 1"),
    ] = None
    key_holder: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="homomorphic: the site that holds the key; default a party of its own, named key-holder"),
    ] = None
    fraction_bits: Annotated[
        Annotated[int, Meta(ge=0, le=24)] | None,
        Meta(
            description="binary digits after the point of an uploaded value; default 16, fewer where the sum of very "
            "many sites has no room for them"
        ),
    ] = None
    limit: Annotated[float, Meta(gt=0, le=1e6, description="uploaded values saturate at ± this magnitude")] = 16.0


class Evaluation(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[evaluation]"""

    metric: Annotated[
        Annotated[str, Meta(pattern="^(accuracy|auroc|auprc|ece|mae|rmse|c-index)$")] | None,
        Meta(
            description="accuracy, auroc, auprc or ece of classes; mae or rmse of numbers; c-index of times; default: "
            "the first of its task"
        ),
    ] = None
    release: Annotated[
        str,
        Meta(
            pattern="^(internal|private|public-cohort)$",
            description='"internal": every site\'s exact figures, which no ε covers; "private": noised counts of all '
            'sites together; "public-cohort": exact figures of public_sites alone',
        ),
    ] = "internal"
    target_epsilon: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="private: ε of all figures together; default privacy.target_epsilon, a fifth for clients"),
    ] = None
    public_sites: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="public-cohort: sites whose records are public"),
    ] = ()
    patience: Annotated[
        Annotated[int, Meta(ge=1, le=100_000)] | None,
        Meta(description="end the run after so many evaluations without a better figure; needs released figures"),
    ] = None
    keep: Annotated[
        str,
        Meta(pattern="^(last|best)$", description='the model that is kept: "last", or "best" by the released figure'),
    ] = "last"
    unseen_sites: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="sites that take no part in training: they adapt the final model to themselves"),
    ] = ()
    unseen_fraction: Annotated[
        float, Meta(ge=0, lt=1, description="share of the other sites that is held out like them, by the public seed")
    ] = 0.0
    unseen_records: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="training records that a held-out site may adapt with; default all"),
    ] = None
    test_fraction: Annotated[
        float,
        Meta(gt=0, lt=1, description="share of every site's records kept for testing, by a keyed hash of their id"),
    ] = 0.25
    every: Annotated[
        int, Meta(ge=1, le=100_000, description="rounds between two evaluations; the last is always one")
    ] = 1
    local_steps: Annotated[int, Meta(ge=1, le=100_000, description="steps of the local-only baseline")] = 200
    local_lr: Annotated[float, Meta(gt=0, le=1e3, description="its learning rate")] = 0.5


class Outage(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[[simulation.outages]]: a site whose answer to one step is lost."""

    round: Annotated[int, Meta(ge=0, description="round, from 0")]
    site: Annotated[str, Meta(min_length=1, description="name of the site")]
    step: Annotated[
        str,
        Meta(
            pattern="^(advertise|share|mask|consistency|unmask|key|commit|close|send|deliver|release|evaluate)$",
            description="advertise, share, mask, consistency or unmask; homomorphic: commit or send, of the key holder "
            "key, close, deliver or release; evaluate",
        ),
    ] = "advertise"


class Simulation(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[simulation]"""

    dropout: Annotated[float, Meta(ge=0, lt=1, description="chance that a site vanishes during a round")] = 0.0
    outages: Annotated[tuple[Outage, ...], Meta(description="outages on schedule")] = ()
    deadline_seconds: Annotated[float, Meta(gt=0, le=86400, description="how long the server waits in each step")] = (
        600.0
    )
    engine: Annotated[
        str,
        Meta(
            pattern="^(auto|cohort|opacus)$",
            description='who computes gradients: "opacus", each site its own; "cohort", one pass for all sites; '
            '"auto", the latter from eight sites on, where it knows the network',
        ),
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=1, le=1024, description="torch threads; as many processes encrypt long vectors")
    ] = 1


class Policy(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[policy]: what every site demands, whatever the run asks for. In a deployment each site has its own file."""

    max_epsilon: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="largest ε a site ever spends on its records; default privacy.target_epsilon"),
    ] = None
    max_epsilon_per_run: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="largest ε that one run spends on them; default what max_epsilon leaves"),
    ] = None
    minimum_noise_multiplier: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="smallest noise_multiplier of whatever a run releases; default what its ε needs"),
    ] = None
    methods: Annotated[
        tuple[str, ...] | None, Meta(description="the only method.name that a site takes part in; default all")
    ] = None
    models: Annotated[
        tuple[str, ...] | None, Meta(description="the only model.name that a site trains; default all")
    ] = None
    units: Annotated[
        tuple[str, ...] | None, Meta(description="the only privacy.unit that a site accepts; default all")
    ] = None
    aggregations: Annotated[
        tuple[str, ...] | None, Meta(description="the only aggregation.kind that a site accepts; default all")
    ] = None
    key_holders: Annotated[
        tuple[str, ...] | None,
        Meta(description="the only parties that a site trusts to hold the key of encrypted sums; default all"),
    ] = None
    hours: Annotated[
        Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None,
        Meta(description='a site\'s local hours in which it begins rounds, "20:00-06:00"; default all'),
    ] = None
    max_parameters: Annotated[int, Meta(ge=1, description="largest model a site builds")] = 50_000_000
    delta: Annotated[float, Meta(gt=0, lt=1, description="δ at which max_epsilon is meant")] = 1e-5
    release_figures: Annotated[
        bool,
        Meta(description="answer with exact accuracy and loss, which no ε covers; false: they stay at the site"),
    ] = True
    max_delta: Annotated[float, Meta(gt=0, lt=1, description="largest δ a site accepts")] = 1e-3
    minimum_cohort: Annotated[int, Meta(ge=1, description="smallest cohort and smallest sum that a site joins")] = 2
    minimum_colluders: Annotated[
        int, Meta(ge=0, description="noise in shares: fewest colluding sites that the claim must survive")
    ] = 0
    refuse_central_noise: Annotated[
        bool, Meta(description="refuse noise = 'central', where the server sees the sum without noise")
    ] = False
    trusted: Annotated[
        tuple[str, ...],
        Meta(
            description='what a site opens because a plan names it: "module:factory" that it imports, SHA-256 of files '
            "that it reads; nothing else"
        ),
    ] = ()
    require_privacy: Annotated[bool, Meta(description="refuse runs without a differential-privacy claim")] = False
    require_secure_aggregation: Annotated[bool, Meta(description="refuse plain aggregation")] = False

    def __post_init__(self) -> None:
        known_names = {
            "methods": [str(kind.__struct_config__.tag) for kind in get_args(Method)],
            "models": [str(kind.__struct_config__.tag) for kind in get_args(Network)],
            "units": [unit.value for unit in PrivacyUnit],
            "aggregations": AGGREGATIONS,
        }
        for key, known in known_names.items():
            for name in getattr(self, key) or ():
                if name not in known:
                    raise ValueError(f"policy.{key}: there is no {name!r}; there are {', '.join(known)}")


Data = BreastCancer | Table | Query | Arrays
Target = Classification | Regression | Rating | Survival | Cox


class Config(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run. Every key has a default; the defaults are the main job on the embedded data."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="names the run's folder")] = (
        "breast-cancer"
    )
    rounds: Annotated[int, Meta(ge=1, le=100_000, description="rounds of federated learning")] = 20
    seed: Annotated[
        int, Meta(ge=0, le=2**63 - 1, description="public seed: start model, simulated partition, train/test split")
    ] = 0
    data: Data = msgspec.field(default_factory=BreastCancer)
    task: Target = msgspec.field(default_factory=Classification)
    model: Network = msgspec.field(default_factory=MLP)
    transfer: Transfer = msgspec.field(default_factory=Everything)
    method: Method = msgspec.field(default_factory=Reptile)
    server: Server = msgspec.field(default_factory=Plain)
    privacy: Privacy = msgspec.field(default_factory=Privacy)
    aggregation: Aggregation = msgspec.field(default_factory=Aggregation)
    evaluation: Evaluation = msgspec.field(default_factory=Evaluation)
    simulation: Simulation = msgspec.field(default_factory=Simulation)
    policy: Policy = msgspec.field(default_factory=Policy)

    @property
    def metric(self) -> str:
        """The figure of merit: the configured one, or the first of the task."""
        return self.evaluation.metric or self.task.metrics[0]

    def __post_init__(self) -> None:
        name = str(type(self.task).__struct_config__.tag)
        if (misfit := self.task.misfit(len(self.data.classes))) is not None:
            raise ValueError(f"task.name = {name!r}: {misfit}")
        if known := {column.name for column in self.data.columns} & set(self.task.columns):
            raise ValueError(f"column {min(known)!r} can not be an input: task {name!r} predicts it")
        if self.metric not in self.task.metrics:
            raise ValueError(f"evaluation.metric = {self.metric!r}: task {name!r} has {', '.join(self.task.metrics)}")
        if self.privacy.standardise_epsilon is not None and not isinstance(self.model, MLP):
            raise ValueError(
                "privacy.standardise_epsilon goes into the first layer of model.name = 'mlp'; leave it out with others"
            )
        if self.privacy.standardise_epsilon is not None and self.transfer != Everything():
            raise ValueError(
                "privacy.standardise_epsilon would shift the inputs that [transfer]'s base knows: remove one"
            )
        if isinstance(self.method, Weighted) != (self.transfer.public_source is not None):
            raise ValueError("method.name = 'weighted' and transfer.public_source need each other: set both or none")
        if self.task.coupled and self.method.sends and self.privacy.unit in (PrivacyUnit.RECORD, PrivacyUnit.PATIENT):
            raise ValueError(
                f"task.name = {name!r} with privacy.unit = {self.privacy.unit.value!r} has no guarantee: each record "
                "moves the loss of others, so that clipping its gradient bounds nothing. Use task.name = 'survival', "
                "or privacy.unit = 'client' or 'none'"
            )
