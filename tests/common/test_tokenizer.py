"""Chat templates: one for training and scoring, with all text, with arguments, and from a list of named ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from paths import TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.tokenizer import (
    as_messages,
    encode_chat,
    load_tokenizer,
    parse_arguments,
    render_prompt,
    with_arguments,
)

OWN = (TINY / "chat_template.jinja").read_text()
# As R1-Distill's and QwQ's: the generation prompt opens the thinking that stored answers have lost.
THINKS = OWN.replace(
    "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>\n"
)
# As Qwen3's: thinking is on unless an argument says otherwise, and the last answer has an empty one.
SWITCHED = OWN.replace(
    "<|assistant|>{% generation %}", "<|assistant|><think>\n\n</think>\n\n{% generation %}"
).replace(
    "{% if add_generation_prompt %}<|assistant|>",
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}",
)  # fmt: skip
PARTS = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = as_messages("Which?", "7391.")


def model_with(folder: Path, **settings: object) -> str:
    """The tiny model with other keys in tokenizer_config.json; a chat template there replaces its file."""
    shutil.copytree(TINY, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if "chat_template" in settings:
        (folder / "chat_template.jinja").unlink()
    return str(folder)


def test_of_several_named_templates_default_is_used(tmp_path):
    """As in Command-R's tokenizer_config.json."""
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": OWN}]
    tokenizer = load_tokenizer(model_with(tmp_path / "model", chat_template=named))
    assert tokenizer.chat_template == OWN
    with pytest.raises(ValueError, match="has chat templates named rag, tool_use, but no `default`"):
        load_tokenizer(model_with(tmp_path / "other", chat_template=[{"name": "tool_use", "template": OWN},
                                                                     {"name": "rag", "template": OWN}]))  # fmt: skip


def test_templates_in_files_of_their_own_are_named_as_well(tmp_path):
    """As today's Transformers saves them."""
    folder = Path(model_with(tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert isinstance(AutoTokenizer.from_pretrained(folder).chat_template, dict)
    assert load_tokenizer(str(folder)).chat_template == OWN


def test_a_template_that_drops_the_text_is_refused(tmp_path):
    """One that reads content as a list of parts, as LLaVA's and SmolVLM's."""
    with pytest.raises(ValueError, match=r"drops the text of the user's messages .some expect a list of parts"):
        load_tokenizer(str(TINY), PARTS)
    with pytest.raises(ValueError, match="drops the text of the assistant's messages"):
        load_tokenizer(str(TINY), "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")


def test_a_prompt_that_training_does_not_have_is_refused():
    for template in (THINKS, SWITCHED, OWN.replace("%}<|assistant|>{% endif %}", "%}<|assistant|> {% endif %}")):
        with pytest.raises(ValueError, match=r"training and scoring would see different prompts.*chat_template_kwargs"):
            load_tokenizer(str(TINY), template)


def test_arguments_are_part_of_the_template():
    tokenizer = load_tokenizer(str(TINY), SWITCHED, {"enable_thinking": False})
    prompt = render_prompt(tokenizer, CHAT[:1])
    assert prompt == "<s><|user|>Which?<|assistant|><think>\n\n</think>\n\n"
    expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        CHAT[:1], chat_template=SWITCHED, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert prompt == expected
    ids, start = encode_chat(tokenizer, CHAT)
    assert tokenizer.decode(ids[start:]) == "7391.</s>"
    # They win over what a program passes, and a second call over the first.
    passed = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    assert tokenizer.apply_chat_template(CHAT[:1], **passed) == prompt
    again = with_arguments(tokenizer.chat_template, {"enable_thinking": True})
    tokenizer.chat_template = again
    assert render_prompt(tokenizer, CHAT[:1]).endswith("<think>\n")


@pytest.mark.parametrize("value", [True, None, 3, 0.5, 'it\'s "quoted"\n', "日本語", [1, None], {"a": True}])
def test_arguments_have_any_json_value(value):
    template = OWN.replace("{{ bos_token }}", "{{ bos_token }}{{ level | tojson }}")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, level=value)
    tokenizer.chat_template = with_arguments(template, {"level": value})
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected


@pytest.mark.parametrize(
    "template", ["\n{{ messages }}{{ x }}", "  {% if x %}a{% endif %}", "{{ messages[0].content }}{{ x }}"]
)
def test_arguments_leave_the_template_s_first_line_as_it_is(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rendered = [
        tokenizer.apply_chat_template(CHAT, chat_template=text, tokenize=False, **passed)
        for text, passed in ((template, {"x": 1}), (with_arguments(template, {"x": 1}), {}))
    ]
    assert rendered[0] == rendered[1]


def test_arguments_that_the_template_does_not_read_are_refused():
    for name in ("enable_thinkin", "messages", "not a name"):
        with pytest.raises(ValueError, match=f"reads no variable '{name}'"):
            load_tokenizer(str(TINY), SWITCHED, {name: False})
    assert parse_arguments('{"enable_thinking": false}') == {"enable_thinking": False} and parse_arguments(None) is None
    for text in ("enable_thinking=false", "[1]", "{"):
        with pytest.raises(ValueError, match=r"chat-template-kwargs: found .* expected JSON"):
            parse_arguments(text)


def test_a_prefix_begins_the_answer_as_in_training():
    """Also where the template puts a space before it."""
    tokenizer = load_tokenizer(
        str(TINY), OWN.replace("<|assistant|>{% generation %}", "<|assistant|> {% generation %}")
    )
    text = tokenizer.apply_chat_template(as_messages("Which?", "Answer: 7"), tokenize=False)
    assert render_prompt(tokenizer, CHAT[:1], "Answer:") == "<s><|user|>Which?<|assistant|> Answer:"
    assert text.startswith(render_prompt(tokenizer, CHAT[:1], "Answer:"))
