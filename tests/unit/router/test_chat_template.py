from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from penstock_router.errors import ConfigurationError, InvalidRequest
from penstock_router.openai.chat_template import ChatTemplate, load_chat_template
from penstock_router.served_model import load_served_model
from tests.unit.router.tiny_models import byte_level, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

HI = [{"role": "user", "content": "hi"}]


def test_blocks_are_trimmed_as_hugging_face_does() -> None:
    source = (
        "{% for message in messages %}\n"
        "    {% if message.role == 'user' %}\n"
        "U:{{ message.content }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert ChatTemplate(source, {}).render(HI) == "U:hi\nA:"


def test_the_helpers_that_templates_use() -> None:
    source = (
        "{{ bos_token }}{{ {'b': 'é', 'a': 1} | tojson }}{{ strftime_now('%Y') | length }}"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
        "{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"
        "{{ 'think' if enable_thinking is defined and not enable_thinking }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render(HI, {"enable_thinking": False})
    assert rendered == '<s>{"b": "é", "a": 1}4hi1think'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(HI)
    assert caught.value.param == "messages"
    assert caught.value.status == 400


def test_a_syntax_error_stops_the_start() -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    for source, text in [("X", "X"), (named, "D")]:
        template = load_chat_template(tmp_path, {"chat_template": source})
        assert template is not None
        assert template.render(HI) == text
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}file")
    template = load_chat_template(tmp_path, {"chat_template": "X", "eos_token": {"content": "E"}})
    assert template is not None
    assert template.render(HI) == "Efile"


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "a", max_model_len=64, eos_token_id=[7, 8])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    model = load_served_model(directory, name="n", created=5)
    end = byte_level().token_to_id("<|end|>")
    assert end is not None
    assert model.eos_ids == tuple(sorted({7, 8, 9, end}))
    assert model.max_model_len == 64
    assert model.chat_template is not None
    assert model.chat_template.render(HI) == "<s><|user|>hi<|end|><|assistant|>"


def test_an_unusable_checkpoint_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json is not there"):
        load_served_model(tmp_path, name="n", created=0)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="not a JSON object"):
        load_served_model(tmp_path, name="n", created=0)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_served_model(tmp_path, name="n", created=0)
    write_checkpoint(tmp_path, max_model_len=0)
    with pytest.raises(ConfigurationError, match="max_position_embeddings"):
        load_served_model(tmp_path, name="n", created=0)
