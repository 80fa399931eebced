import pytest

from swarmnode.errors import DataError
from swarmnode.http.chat import render

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_without_a_template_each_message_is_a_line() -> None:
    assert render(None, MESSAGES) == "System: Be brief.\nUser: Hi\nAssistant:"


def test_a_template_of_the_model_is_used() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert render(template, MESSAGES) == "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for x in range(10000000) %}x{% endfor %}",
        "{% if %}",
        "{% for i in range(5000) %}{{ messages[0].content.center(1000) }}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
    ],
)
def test_a_hostile_or_broken_template_is_refused_with_one_line(template: str) -> None:
    with pytest.raises(DataError, match="chat template") as caught:
        render(template, MESSAGES)
    assert "\n" not in str(caught.value)
