"""A search space is checked against the config's types and rules before anything runs."""

import math
import random

import pytest

from pipelines.presets import PRESETS
from pipelines.search_space import Dimension, parse, parse_all, with_values
from vqvae_core.errors import InputError

CONFIG = PRESETS["smoke"][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.learning-rate=log:1e-4..1e-2", Dimension("train.learning_rate", "log", 1e-4, 1e-2)),
        ("--train.beta2=uniform:0.9..0.999", Dimension("train.beta2", "uniform", 0.9, 0.999)),
        ("vqvae.hidden_channels=log:16..64", Dimension("vqvae.hidden_channels", "log", 16, 64, whole=True)),
        ("vqvae.quantizer.num-codes=choice:32, 64", Dimension("vqvae.quantizer.num_codes", "choice", values=(32, 64))),
        (
            "vqvae.quantizer.learn-by=choice:loss,moving_average",
            Dimension("vqvae.quantizer.learn_by", "choice", values=("loss", "moving_average")),
        ),
        (
            "vqvae.quantizer.normalize=choice:true,False",
            Dimension("vqvae.quantizer.normalize", "choice", values=(True, False)),
        ),
        ("augment.crop-size=choice:none,24", Dimension("augment.crop_size", "choice", values=(None, 24))),
    ],
)
def test_dimensions(text: str, expected: Dimension) -> None:
    assert parse(text, CONFIG) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.learning-rate", "expected FIELD=log:LOW..HIGH"),
        ("train.learning-rate=normal:0..1", "expected FIELD=log:LOW..HIGH"),
        ("train.learning-rat=log:1e-4..1e-2", "found train.learning-rat; train has batch-size, num-lanes"),
        ("trains.x=log:1..2", "found trains.x; it has data, shard, vqvae"),
        ("train.steps.more=log:1..2", "train.steps has no fields"),
        ("train=choice:1,2", "expected a single field, found train, which has several"),
        ("resources.num-workers=choice:1,2", "expected a field of what is computed, found resources.num-workers"),
        ("train.learning-rate=log:0..1", "two numbers LOW..HIGH, LOW below HIGH and above 0 for train.learning-rate"),
        ("train.learning-rate=uniform:1..1", "LOW below HIGH for train.learning-rate, found '1..1'"),
        ("train.learning-rate=uniform:nan..1", "found 'nan..1'"),
        ("train.learning-rate=uniform:0.1", "found '0.1'"),
        ("vqvae.hidden-channels=uniform:16..64.5", "expected two whole numbers"),
        ("vqvae.quantizer.learn-by=log:1..2", "expected a field of numbers for log"),
        ("vqvae.quantizer.learn-by=choice:loss,ema", "expected loss or moving_average for"),
        ("vqvae.quantizer.normalize=choice:yes,no", "expected true or false"),
        ("vqvae.quantizer.num-codes=choice:32,many", "expected a whole number"),
        ("vqvae.quantizer.num-codes=choice:32", "expected two or more different values"),
        ("vqvae.quantizer.num-codes=choice:32,32", "expected two or more different values"),
        ("compare.models=choice:vae,vqvae", "expected a field of single values"),
        ("vqvae.quantizer.decay=uniform:0.5..1.5", "1.5 for vqvae.quantizer.decay: decay must lie between 0 and 1"),
    ],
)
def test_messages(text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text, CONFIG)
    assert words in str(error.value)


def test_a_space_has_each_field_once_and_is_not_empty() -> None:
    one = "train.learning-rate=log:1e-4..1e-2"
    assert len(parse_all([one, "vqvae.commitment-cost=uniform:0.1..2"], CONFIG)) == 2
    with pytest.raises(InputError, match=r"found train.learning-rate 2 times"):
        parse_all([one, "train.learning_rate=uniform:0.1..0.2"], CONFIG)
    with pytest.raises(InputError, match="expected at least one field"):
        parse_all([], CONFIG)


def test_values_go_into_the_config() -> None:
    found = with_values(CONFIG, {"train.learning_rate": 0.5, "vqvae.quantizer.num_codes": 7})
    assert (found.train.learning_rate, found.vqvae.quantizer.num_codes) == (0.5, 7)
    assert found.vqvae.quantizer.code_dim == CONFIG.vqvae.quantizer.code_dim and found.prior == CONFIG.prior
    assert CONFIG.vqvae.quantizer.num_codes == 32


def test_draws() -> None:
    """Logarithms of draws are even; whole numbers reach both ends; a seed gives the same again."""
    generator = random.Random(0)
    log = parse("train.learning-rate=log:1e-4..1e-2", CONFIG)
    drawn = [float(log.draw(generator)) for _ in range(4000)]  # type: ignore[arg-type]
    assert min(drawn) >= 1e-4 and max(drawn) <= 1e-2
    assert sum(value < 1e-3 for value in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(map(math.log10, drawn)) / 4000 == pytest.approx(-3, abs=0.05)
    for text in ("vqvae.hidden-channels=uniform:16..18", "vqvae.hidden-channels=log:16..18"):
        assert {parse(text, CONFIG).draw(generator) for _ in range(300)} == {16, 17, 18}
    choice = parse("vqvae.quantizer.num-codes=choice:32,64", CONFIG)
    assert {choice.draw(generator) for _ in range(100)} == {32, 64}
    assert [log.draw(random.Random(3)) for _ in range(2)] == [log.draw(random.Random(3)) for _ in range(2)]
