"""The emoji's captions, networks and training: seeded, resumable and blind to the held-out prompts."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lehr.export.backbones import pixart
from lehr.export.reference.emoji import captions, data, denoiser, features, text, text_encoder, text_training, vae
from lehr.export.reference.emoji.data import Emoji
from lehr.export.reference.emoji.run import Log
from lehr.runtime.errors import InvalidInput

ARCHIVES = Path(os.environ.get("LEHR_EMOJI_ARCHIVES", "."))  # where npm pack wrote them


def _emoji(label: str, tags: str, *, tone: str = "", group: int = 3) -> Emoji:
    return Emoji(
        hexcode=label, label=label, names=(), tags=tuple(tags.split()), tone=tone, group=group, subgroup=50, weight=1.0
    )


EMOJI = (
    _emoji("red apple", "fruit red food healthy"),
    _emoji("dog face", "pet animal puppy"),
    _emoji("waving hand: dark skin tone", "hand hello bye wave", tone="dark skin tone", group=1),
    _emoji("flag: Japan", "jp flag", group=data.FLAGS),
)
TINY = denoiser.Settings(
    denoiser=replace(
        pixart.EMOJI, hidden_size=32, depth=2, num_heads=2, caption_channels=32, pooled_dim=32, draft_dim=64
    ),
    text=text_encoder.Params(vocabulary=300, longest=32, hidden_size=32, depth=1, num_heads=2, memory=5),
    batch=4,
    steps=8,
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    text.train_tokenizer(captions.texts(EMOJI), path, TINY.text.vocabulary, TINY.text.longest)
    return path


# -------------------------------------------------------------------------------------------------- captions


def test_a_seed_fixes_the_captions_and_another_changes_them() -> None:
    drawn = [[captions.draw(one, random.Random(seed)) for one in EMOJI * 20] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_tenth_of_the_captions_is_empty() -> None:
    rng = random.Random(0)
    empty = sum(captions.draw(EMOJI[0], rng) == "" for _ in range(3000))
    assert 240 < empty < 360


def test_every_caption_of_a_variant_names_its_tone() -> None:
    rng = random.Random(0)
    drawn = [captions.draw(EMOJI[2], rng) for _ in range(500)]
    assert all("dark" in one and "skin" in one and "tone" in one for one in drawn if one)


def test_every_caption_of_a_flag_says_so() -> None:
    rng = random.Random(0)
    drawn = [captions.draw(EMOJI[3], rng) for _ in range(500)]
    assert all("flag" in one.lower() for one in drawn if one)


def test_a_held_out_prompt_is_drawn_again() -> None:
    prompt = captions.held_out()[0][1]
    rng = random.Random(0)
    emoji = replace(EMOJI[0], label=prompt)
    drawn = {captions.words(captions.draw(emoji, rng)) for _ in range(500)}
    assert len(drawn) > 50
    assert not drawn & captions.forbidden()


def test_the_lists_of_prompts_are_complete() -> None:
    held_out = captions.held_out()
    assert len({hexcode for hexcode, _ in held_out}) == len(captions.forbidden()) == 100
    assert len(set(captions.compositions())) == 24


# -------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def described() -> dict[str, Emoji]:
    if not (ARCHIVES / data.NAMES).is_file():
        pytest.skip(f"needs {data.NAMES} in LEHR_EMOJI_ARCHIVES")
    return data.describe(ARCHIVES)


def test_no_held_out_prompt_is_a_caption_of_any_emoji(described: dict[str, Emoji]) -> None:
    names = {name for one in described.values() for name in (one.label, *one.names, *one.tags)}
    assert not {captions.words(name) for name in names} & captions.forbidden()
    for template in captions.TEMPLATES:
        before, after = (captions.words(part) for part in template.split("{}"))
        bare = {
            prompt.removeprefix(before).removesuffix(after).strip()
            for prompt in captions.forbidden()
            if prompt.startswith(before) and prompt.endswith(after)
        }
        assert not bare & {captions.words(name) for name in names}, template


def test_every_held_out_prompt_has_its_emoji_and_no_composition_is_one(described: dict[str, Emoji]) -> None:
    assert {hexcode for hexcode, _ in captions.held_out()} <= set(described)
    labels = {captions.words(one.label) for one in described.values()}
    assert not {captions.words(prompt) for prompt in captions.compositions()} & labels


def test_variants_weigh_less_and_say_their_tone(described: dict[str, Emoji]) -> None:
    assert described["1f44b"].weight == 1.0
    assert described["1f44b"].tone == ""
    assert described["1f44b-1f3fd"].weight == data.ONE_TONE
    assert described["1f44b-1f3fd"].tone == "medium skin tone"
    assert described["1f1ef-1f1f5"].weight == data.FLAG


def test_another_archive_is_refused_by_its_hash(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="npm pack"):
        data.describe(tmp_path)
    (tmp_path / data.NAMES).write_bytes(b"something else")
    with pytest.raises(InvalidInput, match="SHA-256"):
        data.describe(tmp_path)


# -------------------------------------------------------------------------------------------------- networks


def test_padding_does_not_change_the_text_features(tokenizer_file: Path) -> None:
    torch.manual_seed(0)
    tokenizer, encoder = text.load_tokenizer(tokenizer_file), text_encoder.TextEncoder(TINY.text)
    ids, mask = text.tokens(tokenizer, ["Red APPLE"], multiple=1)
    wide_ids, wide_mask = text.tokens(tokenizer, ["red apple"], multiple=16)
    features_, mean = encoder.embed(ids, mask)
    wide, wide_mean = encoder.embed(wide_ids, wide_mask)
    assert wide.shape[1] > features_.shape[1]
    torch.testing.assert_close(wide[:, : ids.shape[1]], features_)
    torch.testing.assert_close(wide_mean, mean)


def test_long_prompts_are_cut_and_keep_their_end(tokenizer_file: Path) -> None:
    ids, mask = text.tokens(text.load_tokenizer(tokenizer_file), ["fruit " * 100, ""])
    assert ids.shape == (2, TINY.text.longest)
    assert ids[0, -1] == ids[1, 1] == 2  # [EOS]
    assert mask.sum(dim=1).tolist() == [TINY.text.longest, 2]


def test_normalised_latents_decode_to_the_same_picture() -> None:
    torch.manual_seed(0)
    network, images = vae.Autoencoder().eval(), torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    before = vae.encode(network, images)
    picture = network.decode(before)
    _, std = network.encode(vae.to_unit_range(images))
    vae.normalise(network, before)
    after = vae.encode(network, images)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(4))
    torch.testing.assert_close(network.decode(after), picture, atol=1e-4, rtol=1e-4)
    deviation = before.std(dim=(0, 2, 3))[None, :, None, None]
    _, normalised = network.encode(vae.to_unit_range(images))
    torch.testing.assert_close(normalised, std / deviation)


def test_a_picture_ranks_first_for_itself_and_a_twin_does_not_count() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    images[4] = images[0]
    made = vae.to_unit_range(images)
    assert features.ranks(features.Features(), made, images).tolist() == [0] * 5
    assert features.ranks(features.Features(), made[:1], images, torch.tensor([2])).item() > 0


# -------------------------------------------------------------------------------------------------- training


def _words() -> text_training.Matcher:
    torch.manual_seed(3)
    return text_training.Matcher(TINY.text, TINY.denoiser, len(EMOJI), text_training.Settings())


def test_the_text_encoder_learns_what_captions_are_of_and_what_that_looks_like(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    latents = torch.randn(len(EMOJI), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tokenizer = text.load_tokenizer(tokenizer_file)

    def train(seconds: float) -> text_training.Matcher:
        log = Log(path=tmp_path / "log.txt", stage="text")
        return text_training.train(
            latents, EMOJI, tokenizer, (TINY.text, TINY.denoiser), tmp_path, log, seconds,
            text_training.Settings(batch=16, warmup=5),
        )  # fmt: skip

    matcher = train(3.0)
    assert "held-out" in (tmp_path / "log.txt").read_text()
    ids, mask = text.tokens(tokenizer, ["food that is red", "my pet dog", "dark skin tone hello", "japan flag"])
    with torch.no_grad():
        logits, draft = matcher(ids, mask)
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert (draft - latents).square().mean() < 0.5 * latents.square().mean()
    memory = matcher.encoder.memory
    torch.testing.assert_close(memory.square().mean(dim=1), torch.ones(len(EMOJI) + 1))
    with torch.no_grad():
        recalled = matcher.encoder(*text.tokens(tokenizer, ["food that is red", ""]))[1]
    nearest = (recalled @ memory.T).argmax(dim=1)
    assert nearest.tolist() == [0, len(EMOJI)], "the last row is the empty text's"
    again = train(1e9)  # what is done is not done again
    for key, value in matcher.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)


def test_noise_on_pooled_features_keeps_their_length_and_goes_up_to_its_limit() -> None:
    pooled = torch.nn.functional.rms_norm(torch.randn(4000, 64), (64,))
    noisy = denoiser.blurred(pooled, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy.square().mean(dim=1), torch.ones(4000), atol=1e-3, rtol=0)
    cosine = (noisy * pooled).mean(dim=1)
    least = 1 / (1 + denoiser.BLUR**2) ** 0.5  # of noise at its limit, in many dimensions
    assert cosine.max() > 0.999
    assert 0.6 * least < cosine.min() < least


def test_the_learning_rate_warms_up_holds_and_falls_to_nothing() -> None:
    settings = replace(TINY, steps=1000, warmup=100, decay=0.25)
    rates = [denoiser.rate(step, settings) for step in range(1000)]
    assert rates[49] == 0.5
    assert set(rates[100:750]) == {1.0}
    assert rates[875] == 0.5
    assert 0 < rates[999] < 0.01


def _train(folder: Path, tokenizer_file: Path, latents: Tensor, steps: int) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    shown: list[int] = []
    model = denoiser.train(
        latents,
        EMOJI,
        text.load_tokenizer(tokenizer_file),
        _words(),
        folder,
        Log(path=folder / "log.txt", stage="test"),
        TINY,
        steps,
        show=lambda _, step: shown.append(step),
        show_every=1e9,
    )
    assert shown == [steps]
    return model.state_dict()


def test_a_run_that_stopped_ends_where_an_uninterrupted_one_does(tmp_path: Path, tokenizer_file: Path) -> None:
    latents = torch.randn(len(EMOJI), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = _train(tmp_path / "whole", tokenizer_file, latents, 5)
    half = _train(tmp_path / "halves", tokenizer_file, latents, 2)
    shutil.copytree(tmp_path / "halves", tmp_path / "resumed")
    resumed = _train(tmp_path / "resumed", tokenizer_file, latents, 5)
    assert any(not torch.equal(half[key], whole[key]) for key in whole)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, msg=key)


def test_sampling_is_seeded_and_listens_to_the_prompt(tokenizer_file: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = denoiser.Model(TINY), text.load_tokenizer(tokenizer_file)
    for parameter in model.denoiser.parameters():  # a fresh model gives zero whatever the prompt
        torch.nn.init.normal_(parameter, std=0.2)
    first, same, other = (
        denoiser.sample(model, tokenizer, [prompt], steps=2, guidance=4.0, seed=0)
        for prompt in ("red apple", "red apple", "dog face")
    )
    assert isinstance(model.denoiser, pixart.PixArt)
    assert first.shape == (1, 4, 16, 16)
    torch.testing.assert_close(first, same)
    assert (first - other).abs().max() > 1e-3
