"""Model families: one record says everything of a family, and a made-up one works by its record alone."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput

import sae_census
from sae_census.compute.numbers.logits import logit_effects
from sae_census.compute.numbers.sae import Relu, SparseAutoencoder
from sae_census.io.model.families import FAMILIES, Family, Tap
from sae_census.io.model.generation import next_token_entropy
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.model.paths import Paths
from sae_census.io.model.unembedding import read_unembedding
from sae_census.steps.effects.tracing import Probe, split
from sae_census.types import HookPoint, Stream

SIZE, HEADS, VOCABULARY, CAP = 16, 2, 23, 2.0
IDS = torch.arange(9) % 11 + 3
RECORD = Family(
    names=("bulb",),
    called=r"bulb-\d",
    streams={
        "resid_pre": Tap("", "in"),
        "resid_mid": Tap("calm_two", "in"),
        "resid_post": Tap("", "out"),
        "attn_out": Tap("look", "out"),
        "attn_z": Tap("look.back", "in"),
        "mlp_in": Tap("think", "in"),
        "mlp_post": Tap("think.shrink", "in"),
        "mlp_out": Tap("think", "out"),
    },
    attention_norm="calm_one",
    mlp_norm="calm_two",
    projections=("joint",),
    final_norm="calm_last",
    layer_norms=True,
    positions="where",
    logit_cap="cap",
)


class BulbConfig(PreTrainedConfig):
    model_type = "bulb"
    hidden_size = SIZE
    vocab_size = VOCABULARY
    num_hidden_layers = 2
    num_attention_heads = HEADS
    tie_word_embeddings = False
    cap = CAP


class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint, self.back = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        parts = self.joint(hidden_states).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts
        future = torch.full((length, length), -torch.inf).triu(1)
        pattern = (queries @ keys.transpose(-1, -2) + future).softmax(dim=-1)
        return self.back((pattern @ values).transpose(1, 2).flatten(2)), pattern


class Think(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Linear(SIZE, 24), nn.Linear(24, SIZE)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.shrink(self.grow(hidden_states).tanh())


class Bulb(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calm_one, self.look = nn.LayerNorm(SIZE), Look()
        self.calm_two, self.think = nn.LayerNorm(SIZE), Think()

    def forward(self, hidden_states: Tensor) -> Tensor:
        middle = hidden_states + self.look(self.calm_one(hidden_states))[0]
        return middle + self.think(self.calm_two(middle))


class BulbPreTrained(PreTrainedModel):
    config_class = BulbConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        pass


class BulbModel(BulbPreTrained):
    def __init__(self, config: BulbConfig):
        super().__init__(config)
        self.words, self.where = nn.Embedding(VOCABULARY, SIZE), nn.Embedding(32, SIZE)
        self.row = nn.ModuleList(Bulb() for _ in range(config.num_hidden_layers))
        self.calm_last = nn.LayerNorm(SIZE)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = self.words(input_ids) + self.where(torch.arange(input_ids.shape[1]))
        for block in self.row:
            hidden = block(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.calm_last(hidden))


class BulbForCausalLM(BulbPreTrained, GenerationMixin):
    def __init__(self, config: BulbConfig):
        super().__init__(config)
        self.model, self.head = BulbModel(config), nn.Linear(SIZE, VOCABULARY, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        logits = self.head(self.model(input_ids).last_hidden_state)
        return CausalLMOutput(logits=CAP * torch.tanh(logits / CAP))


@pytest.fixture(scope="module")
def bulb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    """A model of a family that nobody has heard of, loaded after its record was added as CONTRIBUTING.md says."""
    AutoConfig.register("bulb", BulbConfig)
    AutoModelForCausalLM.register(BulbConfig, BulbForCausalLM)
    folder = tmp_path_factory.mktemp("bulb")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BulbForCausalLM(BulbConfig())
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.4)
        model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "bulb", RECORD)
        yield LanguageModel(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def sae_of(width: int) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(5)
    shapes = {"w_enc": (width, 6), "b_enc": (6,), "w_dec": (6, width), "b_dec": (width,)}
    return SparseAutoencoder(
        **{name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}, gate=Relu()
    )


def test_a_made_up_family_is_observed_at_every_stream_of_its_record(bulb: LanguageModel) -> None:
    points = [HookPoint(layer, stream) for layer in range(2) for stream in RECORD.streams]
    with bulb.captures(points) as captures:
        got = {point: value for point, value in bulb.run(captures, IDS[None]).items()}

    def at(layer: int, stream: Stream) -> Tensor:
        return got[HookPoint(layer, stream)]

    for layer in range(2):
        torch.testing.assert_close(at(layer, "resid_mid"), at(layer, "resid_pre") + at(layer, "attn_out"))
        torch.testing.assert_close(at(layer, "resid_post"), at(layer, "resid_mid") + at(layer, "mlp_out"))
    assert bulb.facts.family == "bulb"


@pytest.mark.parametrize("stream", RECORD.streams)
def test_a_feature_of_a_made_up_family_is_traced_to_parts_that_add_up(bulb: LanguageModel, stream: Stream) -> None:
    paths, point = Paths(bulb.inner), HookPoint(1, stream)
    x = paths.read(IDS, [point], range(len(IDS))).streams[point]
    sae = sae_of(x.shape[1])
    truth = sae.pre_activations(x, 3)
    probes = [Probe(hook_point=point, sae=sae, feature=3, position=position) for position in (0, 4, 7)]
    for one, position in zip(split(paths, IDS, probes), (0, 4, 7), strict=True):
        assert one.pre_activation == pytest.approx(float(truth[position]), abs=1e-4)
        assert one.total == pytest.approx(one.pre_activation, abs=1e-3)
        assert one.position != 0 or stream in ("attn_out", "attn_z")


def test_direct_logits_and_entropy_of_a_made_up_family_are_those_of_its_own_head(bulb: LanguageModel) -> None:
    rows = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    found = logit_effects(rows, read_unembedding(bulb.inner, VOCABULARY), top_k=1, mode="ln_final")
    own = bulb.inner.head(bulb.inner.model.calm_last(rows))
    torch.testing.assert_close(torch.from_numpy(found.positive_logit[:, 0]), own.max(dim=1).values)
    hidden = bulb.inner.model(IDS[None]).last_hidden_state
    logits = bulb.inner(IDS[None]).logits
    torch.testing.assert_close(
        next_token_entropy(bulb, hidden), torch.distributions.Categorical(logits=logits).entropy()
    )


def test_no_other_module_names_a_family() -> None:
    """What is known of a family and stands elsewhere is found by nobody who adds one."""
    root = Path(sae_census.__file__).parent
    elsewhere = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place == "io/model/families.py" or place.startswith(("io/checkpoints/", "io/loading/")):
            continue  # formats of checkpoints and of GGUF have names of their own
        for node in ast.walk(ast.parse(path.read_text())):
            if (place, getattr(node, "value", None)) == ("steps/model/demands.py", "gpt2"):
                continue  # a model that TransformerLens calls gpt2-small
            if isinstance(node, ast.Constant) and node.value in FAMILIES:
                elsewhere.append(f"{place}:{node.lineno} {node.value}")
    assert elsewhere == []
