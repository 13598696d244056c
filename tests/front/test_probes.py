"""The measurements against independent computations: one row at a time, no cache, float64 where it matters."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import toy_llama, with_lora
from mask_the_target.base import adapters_off
from mask_the_target.front import probes
from mask_the_target.front.facts import facts
from mask_the_target.front.probes import encode_row, target_loss, text_loss, text_windows

SPECIAL = ["<unk>", "<bos>", "<end>", "<user>", "<assistant>", "<system>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?'\n"
TEMPLATE = (
    "<system>be brief<end>\n{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, a chat template with a system turn, and a newline after each turn."""
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def toy() -> LlamaForCausalLM:
    return toy_llama(vocab_size=len(SPECIAL) + len(CHARACTERS), max_position_embeddings=512)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of uneven length, some answers of one character."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdef ", k=chance.choice([1, 2, 5, 9]))).strip() or "a" for _ in range(2 * count)]
    return [
        {"prompt": chat(f"Say {words[2 * n]}."), "completion": [{"role": "assistant", "content": words[2 * n + 1]}]}
        for n in range(count)
    ]


def log_probs_by_hand(model: LlamaForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """[length - 1, V] float64: one sequence, no cache, no batch."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
    model.train(training)
    return logits.double().log_softmax(-1)


def sum_by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> float:
    """Loss of the answer and its <end> after the rendered prompt, in nats, from strings alone."""
    prompt = f"<system>be brief<end>\n<user>{question}<end>\n<assistant>"
    ids = tokenizer(f"{prompt}{answer}<end>", add_special_tokens=False)["input_ids"]
    table = log_probs_by_hand(model, ids)
    start = len(ids) - len(answer) - 1
    return -sum(table[place - 1, ids[place]].item() for place in range(start, len(ids)))


# --- the target ------------------------------------------------------------------------------------------------------


def test_target_loss_is_that_of_each_answer_computed_by_hand() -> None:
    model, tokenizer, data = toy(), character_tokenizer(), rows(40)
    found = target_loss(model, tokenizer, data)
    pairs = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in data]
    sums = [sum_by_hand(model, tokenizer, question, answer) for question, answer in pairs]
    assert found.tokens == [len(answer) + 1 for _, answer in pairs]
    assert found.sums == pytest.approx(sums, abs=1e-4)
    assert found.loss == pytest.approx(sum(sums) / sum(found.tokens), abs=1e-5)


def test_a_batch_gives_what_single_rows_give() -> None:
    model, tokenizer, data = toy(), character_tokenizer(), rows(30)
    together = target_loss(model, tokenizer, data)
    alone = [target_loss(model, tokenizer, [row]).sums[0] for row in data]
    assert together.sums == pytest.approx(alone, abs=1e-4)


def test_few_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, data = toy(), character_tokenizer(), rows(60)
    expected = target_loss(model, tokenizer, data)
    monkeypatch.setattr(probes, "MAX_LOGIT_ROWS", 24)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0] * logits.shape[1]))
    assert target_loss(model, tokenizer, data).sums == pytest.approx(expected.sums, abs=1e-4)
    assert max(seen) <= 24


def test_plain_text_rows_are_scored_with_the_end_of_sequence() -> None:
    model, tokenizer = toy(), character_tokenizer(bos=True)
    found = target_loss(model, tokenizer, [{"prompt": "ab", "completion": "cd"}])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ["<bos>", "a", "b", "c", "d", "<end>"]]
    table = log_probs_by_hand(model, ids)
    assert found.tokens == [3]
    assert found.loss == pytest.approx(-sum(table[place - 1, ids[place]].item() for place in (3, 4, 5)) / 3, abs=1e-5)


def test_what_a_template_writes_after_the_turn_is_no_part_of_the_answer() -> None:
    tokenizer = character_tokenizer()
    prompt, answer = encode_row(tokenizer, rows(1)[0] | {"completion": [{"role": "assistant", "content": "ok"}]})
    assert tokenizer.decode(prompt).endswith("<assistant>")
    assert tokenizer.decode(answer) == "ok<end>"


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant>hm {% endif %}")
    with pytest.raises(ValueError, match="no answer can be scored"):
        encode_row(tokenizer, rows(1)[0])


def test_an_empty_prompt_is_refused_by_its_row() -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "c"}]
    with pytest.raises(ValueError, match=r"prompt 1 \(counted from 0\) is empty"):
        target_loss(toy(), character_tokenizer(), rows)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no held-out target row"):
        target_loss(toy(), character_tokenizer(), [])


# --- greedy answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full attention", "sliding window"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_answers_are_those_of_generate_row_by_row(seed: int, kind: str) -> None:
    model, tokenizer = toy() if kind == "full attention" else toy_with_window(), character_tokenizer()
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 1.5  # must not matter
    with torch.no_grad():  # so that some rows end early and others don't
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    asked = [chat(word) for word in dict.fromkeys(row["prompt"][0]["content"] for row in rows(30, seed))]
    found = probes.greedy_answers(model, tokenizer, asked, 12, batch_size=7)
    expected = []
    for prompt in asked:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.eval().generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        expected.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert found == expected
    assert len({len(answer) for answer in found}) > 1


def toy_with_window() -> Any:
    config = toy().config.to_dict() | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config |= {"use_sliding_window": True}
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**config))


def test_only_prompts_whose_padding_is_left_out_are_padded() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=16, n_layer=1, n_head=2))  # positions by the mask
    mamba = MambaForCausalLM(MambaConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, state_size=4))
    for model, padded in ((toy(), True), (toy_with_window(), False), (bloom, False), (mamba, False)):
        with torch.no_grad():
            prefix = probes._shared_prefix(model, [[5, 6, 7], [5, 6, 8, 9]])
        assert prefix.takes_padding(model) is padded, type(model).__name__


def test_an_end_of_turn_that_only_the_model_knows_ends_an_answer() -> None:
    model, tokenizer = toy(), character_tokenizer()
    (long,) = probes.greedy_answers(model, tokenizer, [chat("hello")], 10)
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(long[3])]
    (short,) = probes.greedy_answers(model, tokenizer, [chat("hello")], 10)
    assert short == long[: long.index(long[3])]


def distance_by_definition(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Levenshtein's recursion, without a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return distance_by_definition(a[:-1], b[:-1])
    shorter = ((a[:-1], b), (a, b[:-1]), (a[:-1], b[:-1]))
    return 1 + min(distance_by_definition(*pair) for pair in shorter)


sentences = st.lists(st.sampled_from(["AE1", "K", "T"]), max_size=5).flatmap(
    lambda words: st.sampled_from([" ", "  ", "\n", "\t "]).map(lambda space: space.join(words) + space)
)


@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4))
def test_token_edits_are_the_fewest(pairs: list[tuple[str, str]]) -> None:
    edits, tokens = probes.token_edits([answer for answer, _ in pairs], [reference for _, reference in pairs])
    assert edits == [distance_by_definition(tuple(a.split()), tuple(b.split())) for a, b in pairs]
    assert tokens == sum(len(reference.split()) for _, reference in pairs)


def test_task_metrics_of_known_pairs() -> None:
    # One substitution, one insertion, and a right answer: 2 edits to 3 + 1 + 2 tokens.
    answers, references = ["K AE1 D", "B AW1", "IH1  T"], ["K AE1 T", "B", "IH1 T"]
    assert probes.token_edits(answers, references) == ([1, 1, 0], 6)
    assert probes.exact_matches(answers, references) == [False, False, True]
    assert probes.chrf(["IH1 T"], ["IH1 T"]) == pytest.approx(100)
    assert probes.chrf(["xyzxyzxyz"], ["abcdef abc"]) == 0


def test_chrf_is_popovics_formula() -> None:
    answers = ["the capital of france is paris", "madrid, I think", "roma"]
    references = ["The capital of France is Paris.", "it is madrid", "rome is it"]
    precisions, recalls = [], []
    for n in range(1, 7):
        hits = total_answer = total_reference = 0
        for answer, reference in zip(answers, references, strict=True):
            grams = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in
                     ("".join(answer.split()), "".join(reference.split()))]  # fmt: skip
            hits += (grams[0] & grams[1]).total()
            total_answer += grams[0].total()
            total_reference += grams[1].total()
        precisions.append(hits / total_answer)
        recalls.append(hits / total_reference)
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    assert probes.chrf(answers, references) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.integers(400, 3000), st.integers(1, 12), st.booleans())
def test_windows_cover_a_text_evenly_and_never_overlap(words: int, count: int, bos: bool) -> None:
    tokenizer = character_tokenizer(bos)
    text = " ".join(f"w{n}." for n in range(words))  # every word is unique, so a window's place can be found
    windows = text_windows(tokenizer, text, count, length=64)
    assert {len(ids) for ids in windows} == {64}
    assert all((ids[0] == 1) is bos for ids in windows)
    found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in windows]
    starts = [text.index(window) for window in found]
    longest = len(f"w{words}. ")
    for place, start in enumerate(starts):
        assert 0 <= start - place * (len(text) // count) <= longest
        assert start == 0 or text[start - 1] == " "
    for (start, following), window in zip(pairwise(starts), found[:-1], strict=True):
        assert start + len(window) <= following


def test_a_text_too_short_for_its_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 windows of 64 tokens don't fit a text of 200 characters"):
        text_windows(character_tokenizer(), "abcd " * 40, 4, 64)


@pytest.mark.parametrize("bos", [False, True])
def test_text_loss_is_that_of_each_window_computed_by_hand(monkeypatch: pytest.MonkeyPatch, bos: bool) -> None:
    model, tokenizer = toy(), character_tokenizer(bos)
    text = "".join(random.Random(0).choices("abcdefghij ", k=2000))
    monkeypatch.setitem(probes.TEXT_SOURCES, "toy", lambda: text)
    found = text_loss(model, tokenizer, "toy", windows=9, length=100)
    expected = []
    for ids in text_windows(tokenizer, text, 9, 100):
        table = log_probs_by_hand(model, ids)
        expected.append(-table[torch.arange(99), ids[1:]].mean().item())
    assert found.windows == pytest.approx(expected, abs=1e-5)
    assert found.loss == pytest.approx(sum(expected) / 9, abs=1e-5)
    assert found.tokens == 9 * 99


def test_the_sources_are_prose_of_enough_length() -> None:
    docs, bible = (probes.TEXT_SOURCES[source]() for source in ("python_docs", "bible"))
    assert len(docs) > 300_000
    assert "assert" in docs
    assert len(bible) > 3_000_000
    assert bible.startswith("In the beginning God created the heavens and the earth. Now the earth was formless")
    assert "`" not in bible


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'wikitext'; known: python_docs, bible"):
        text_loss(toy(), character_tokenizer(), "wikitext")


# --- drift -----------------------------------------------------------------------------------------------------------


def test_drift_is_the_kl_computed_by_hand() -> None:
    model, tokenizer, data = with_lora(toy(), moved=0.3), character_tokenizer(), rows(12)
    found = probes.drift(model, tokenizer, data)
    masked = full = 0.0
    count = 0
    for row in data:
        prompt, answer = encode_row(tokenizer, row)
        adapted = log_probs_by_hand(model, prompt + answer)[-len(answer) :]
        with adapters_off(model):
            base = log_probs_by_hand(model, prompt + answer)[-len(answer) :]
        for p_b, p_a, target in zip(base.exp(), adapted.exp(), answer, strict=True):
            full += (p_b * (p_b / p_a).log()).sum().item()
            rest = torch.arange(len(p_b)) != target
            q_b, q_a = p_b[rest] / (1 - p_b[target]), p_a[rest] / (1 - p_a[target])
            masked += (q_b * (q_b / q_a).log()).sum().item()
        count += len(answer)
    assert found.tokens == count
    assert found.full_kl == pytest.approx(full / count, rel=1e-4)
    assert found.masked_kl == pytest.approx(masked / count, rel=1e-4)
    assert found.masked_kl > 1e-3


def test_drift_is_zero_at_the_start_and_the_layers_come_back_on() -> None:
    model = with_lora(toy())
    found = probes.drift(model, character_tokenizer(), rows(6))
    assert abs(found.masked_kl) <= 1e-6
    assert abs(found.full_kl) <= 1e-6
    with adapters_off(model):
        pass  # raises if nothing is there to turn off


def test_drift_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter layer"):
        probes.drift(toy(), character_tokenizer(), rows(2))


# --- all of them -----------------------------------------------------------------------------------------------------


def _all(model: torch.nn.Module, autocast: torch.dtype | None) -> None:
    tokenizer = character_tokenizer()
    target_loss(model, tokenizer, rows(3), autocast=autocast)
    probes.greedy_answers(model, tokenizer, [chat("hi")], 3, autocast=autocast)
    text_loss(model, tokenizer, "python_docs", windows=2, length=32, autocast=autocast)
    facts(model, tokenizer, limit=1, kinds=["capital"], autocast=autocast)
    probes.drift(model, tokenizer, rows(3))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_model_comes_back_as_it_was(autocast: torch.dtype | None) -> None:
    model = with_lora(toy(), lora_dropout=0.5)
    model.get_submodule("base_model.model.model.layers.0").eval()  # a mixed state
    before = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _all(model, autocast)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_model_comes_back_as_it_was_after_an_error() -> None:
    model = with_lora(toy())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), probes.measuring(model, torch.bfloat16):
        raise KeyboardInterrupt
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_dropout_is_off_while_measuring() -> None:
    model, tokenizer = with_lora(toy(), moved=0.3, lora_dropout=0.5), character_tokenizer()
    assert target_loss(model, tokenizer, rows(5)).sums == target_loss(model, tokenizer, rows(5)).sums


def test_bfloat16_measures_nearly_the_same() -> None:
    model, tokenizer = toy(), character_tokenizer()
    exact = target_loss(model, tokenizer, rows(20))
    rounded = target_loss(model, tokenizer, rows(20), autocast=torch.bfloat16)
    assert rounded.sums != exact.sums
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


@pytest.mark.slow
def test_the_real_base_knows_facts_and_no_phonemes(smollm2: Any) -> None:
    from transformers import AutoTokenizer

    from mask_the_target.front.recipes import recipe_rows

    model, tokenizer = smollm2(), AutoTokenizer.from_pretrained(smollm2.path)
    found = facts(model, tokenizer, limit=10)
    assert sum(found.greedy) > 0.4 * len(found.greedy)
    assert sum(found.logprob) > 0.75 * len(found.logprob)
    assert target_loss(model, tokenizer, recipe_rows("arpabet")["test"][:40]).loss == pytest.approx(7.6, abs=0.4)
    assert math.exp(text_loss(model, tokenizer, "bible", windows=8).loss) < 40
