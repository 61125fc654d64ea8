"""Texts as models of several families write them, and the messages that they are."""

from typing import NamedTuple

from ingine.engine.message_format import NamedFunction, ToolChoice
from ingine.engine.parsers.message_parser import MessageParser
from ingine.engine.parsers.reasoning import REASONING_TAGS

FUNCTIONS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
    },
    "now": {"type": "object", "properties": {}},
    "write_file": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "mode": {"type": ["integer", "null"]},
            "options": {"type": "object"},
            "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]},
            "ratio": {"type": "number"},
            "force": {"type": "boolean"},
            "any": {"description": "no type"},
        },
    },
}


class Output(NamedTuple):
    format: str | None
    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """(name, arguments) of each."""
    reasoning: str = ""
    tags: str | None = None
    choice: ToolChoice = "auto"
    starts_in_reasoning: bool = False

    def parser(self) -> MessageParser:
        return MessageParser(
            tool_format=self.format,
            functions=FUNCTIONS,
            tool_choice=self.choice,
            reasoning=REASONING_TAGS[self.tags] if self.tags else None,
            starts_in_reasoning=self.starts_in_reasoning,
            key="job",
        )


PARIS = '{"city": "Paris"}'
TRICKY = r'{"city": "a } ] { \" \\", "x": [{"}": "</tool_call>"}, {}, [[]]], "u": "\u00e9 \ud83d\ude00 😀 é"}'
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "now", "arguments": {}}'

CODER = """<tool_call>
<function=write_file>
<parameter=path>
/tmp/a "b"\\c.py
</parameter>
<parameter=text>
def f():
    return {"a": "\t<b>"}

</parameter>
<parameter=mode>
420
</parameter>
<parameter=options>
{"deep": {"er": [1, 2]}}
</parameter>
<parameter=force>
True
</parameter>
</function>
</tool_call>"""
CODER_ARGUMENTS = (
    r'{"path": "/tmp/a \"b\"\\c.py", "text": "def f():\n    return {\"a\": \"\t<b>\"}\n", "mode": 420, '
    r'"options": {"deep": {"er": [1, 2]}}, "force": true}'
)


def tagged(*objects: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


OUTPUTS = {
    "no tools": Output(None, " Hi <tool_call>{} there\n\n", " Hi <tool_call>{} there\n\n"),
    "choice none": Output("hermes", tagged(WEATHER), tagged(WEATHER), choice="none"),
    "plain text": Output("hermes", "\n1 < 2 <too\n", "\n1 < 2 <too\n"),
    "one call": Output("hermes", tagged(WEATHER), calls=(("get_weather", PARIS),)),
    "three calls": Output(
        "hermes",
        tagged(WEATHER, NOW, WEATHER) + "\n",
        calls=(("get_weather", PARIS), ("now", "{}"), ("get_weather", PARIS)),
    ),
    "text around calls": Output(
        "hermes",
        f"Let me see.\n\n{tagged(WEATHER)}\nand {tagged(NOW)} done \n",
        "Let me see.\n\nand done \n",
        (("get_weather", PARIS), ("now", "{}")),
    ),
    "two in one tag": Output(
        "hermes", f"<tool_call>{WEATHER}\n{NOW}</tool_call>", calls=(("get_weather", PARIS), ("now", "{}"))
    ),
    "without arguments": Output("hermes", tagged('{"name": "now"}'), calls=(("now", "{}"),)),
    "null arguments": Output("hermes", tagged('{"name": "now", "arguments": null}'), calls=(("now", "{}"),)),
    "tricky arguments": Output(
        "hermes",
        tagged(f'{{"name": "get_weather", "arguments": {TRICKY}}}'),
        calls=(("get_weather", TRICKY),),
    ),
    "spaces kept": Output(
        "hermes",
        tagged('{ "name" :"now" , "arguments": {"a" :\n 1 , "b": [ ] } }'),
        calls=(("now", '{"a" :\n 1 , "b": [ ] }'),),
    ),
    "arguments first": Output(
        "hermes",
        tagged(f'{{"arguments": {TRICKY}, "id": 7, "name": "get_weather"}}'),
        calls=(("get_weather", TRICKY),),
    ),
    "arguments in a string": Output(
        "hermes",
        tagged(r'{"name": "get_weather", "arguments": "{\"city\": \"\u00e9\\n\ud83d\ude00\ud83d\u00e9\"}"}'),
        calls=(("get_weather", '{"city": "é\\n😀\N{REPLACEMENT CHARACTER}é"}'),),
    ),
    "a name with escapes": Output(
        "hermes", tagged(r'{"name": "\u006eow", "arguments": {}}'), calls=(("now", "{}"),)
    ),
    "unknown keys behind": Output(
        "hermes",
        tagged('{"name": "now", "arguments": {}, "x": [{}], "arguments": 1}'),
        calls=(("now", "{}"),),
    ),
    "no closing tag": Output("hermes", f"<tool_call>\n{WEATHER}", calls=(("get_weather", PARIS),)),
    "tag twice": Output("hermes", f"<tool_call>\n{tagged(NOW)}", "<tool_call>", (("now", "{}"),)),
    "a brace too many": Output("hermes", tagged(NOW + "}") + "\nx", "}\nx", (("now", "{}"),)),
    "no opening tag": Output("hermes", f"{NOW}\n</tool_call>", f"{NOW}\n</tool_call>"),
    "unknown function": Output(
        "hermes",
        "a\n" + tagged('{"name": "rm", "arguments": {}}', NOW),
        "a\n" + tagged('{"name": "rm", "arguments": {}}'),
        (("now", "{}"),),
    ),
    "not JSON": Output("hermes", tagged("get_weather(Paris)"), tagged("get_weather(Paris)")),
    "an empty tag": Output("hermes", tagged(""), tagged("")),
    "arguments no object": Output(
        "hermes", tagged('{"name": "now", "arguments": 5}'), tagged('{"name": "now", "arguments": 5}')
    ),
    "cut before the call": Output(
        "hermes", 'ok <tool_call>\n{"name": "get_wea', 'ok <tool_call>\n{"name": "get_wea'
    ),
    "cut behind the name": Output(
        "hermes", '<tool_call>\n{"name": "now", "argum', '<tool_call>\n{"name": "now", "argum'
    ),
    "cut in arguments": Output(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par\\',
        calls=(("get_weather", '{"city": "Par\\'),),
    ),
    "malformed arguments": Output(
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": [tru, }</tool_call>' + tagged(NOW) + "!",
        "!",
        (("now", '{"a": [tru, }'), ("now", "{}")),
    ),
    "half a tag": Output("hermes", "a <tool_cal", "a <tool_cal"),
    "reasoning": Output(
        "hermes",
        f"<think>\nHm,\n\nwell.\n</think>\n\nSo:\n{tagged(NOW)}",
        "So:",
        (("now", "{}"),),
        "Hm,\n\nwell.",
        "think",
    ),
    "reasoning begun in the prompt": Output(
        "hermes",
        "\nHm </thin\n</think>\nYes.\n",
        "Yes.\n",
        (),
        "Hm </thin",
        "think",
        starts_in_reasoning=True,
    ),
    "reasoning begun twice": Output(
        "hermes", "<think>\nHm</think>Yes", "Yes", (), "Hm", "think", starts_in_reasoning=True
    ),
    "reasoning cut off": Output("hermes", "<think>\nHm \n</th", "", (), "Hm \n</th", "think"),
    "no reasoning": Output("hermes", "\n\nYes <think>no</think>", "\n\nYes <think>no</think>", tags="think"),
    "empty reasoning": Output("hermes", "<think>\n\n</think>\n\nYes", "Yes", tags="think"),
    "a call in the reasoning": Output(
        "hermes",
        f"<think>I will {tagged(WEATHER)} now</think>{tagged(NOW)}",
        "",
        (("now", "{}"),),
        f"I will {tagged(WEATHER)} now",
        "think",
    ),
    "llama": Output(
        "llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', calls=(("get_weather", PARIS),)
    ),
    "llama with a tag": Output(
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}',
        calls=(("get_weather", PARIS),),
    ),
    "llama, several": Output(
        "llama3_json",
        f"<|python_tag|>{WEATHER}; {NOW};{WEATHER}\n{NOW}",
        calls=(("get_weather", PARIS), ("now", "{}"), ("get_weather", PARIS), ("now", "{}")),
    ),
    "llama, text around": Output(
        "llama3_json", f"I look:\n{NOW}; \nbye", "I look:\n; \nbye", (("now", "{}"),)
    ),
    "llama, other JSON": Output(
        "llama3_json", '{"answer": {"name": "now"}}\n{"a": 1}', '{"answer": {"name": "now"}}\n{"a": 1}'
    ),
    "llama, code": Output("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    "mistral": Output(
        "mistral", f"[TOOL_CALLS] [{WEATHER}, {NOW}]", calls=(("get_weather", PARIS), ("now", "{}"))
    ),
    "mistral, newer": Output(
        "mistral",
        f"Sure.[TOOL_CALLS]get_weather[ARGS]{TRICKY}[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{{}}",
        "Sure.",
        (("get_weather", TRICKY), ("now", "{}")),
    ),
    "mistral, without [ARGS]": Output("mistral", "[TOOL_CALLS]now{} ok", "ok", (("now", "{}"),)),
    "mistral, unknown": Output(
        "mistral",
        "[TOOL_CALLS]rm[ARGS]{}[TOOL_CALLS][TOOL_CALLS]now[ARGS]{}",
        "[TOOL_CALLS]rm[ARGS]{}[TOOL_CALLS]",
        (("now", "{}"),),
    ),
    "mistral, malformed": Output(
        "mistral",
        '[TOOL_CALLS]now[ARGS]{"a": [1}[TOOL_CALLS]now[ARGS]{}',
        calls=(("now", '{"a": [1}'), ("now", "{}")),
    ),
    "mistral, cut": Output("mistral", f"[TOOL_CALLS] [{WEATHER}, {{", ", {", (("get_weather", PARIS),)),
    "mistral, reasoning": Output(
        "mistral", "[THINK]Hm[/THINK][TOOL_CALLS]now[ARGS]{}", "", (("now", "{}"),), "Hm", "mistral"
    ),
    "coder": Output("qwen3_coder", CODER, calls=(("write_file", CODER_ARGUMENTS),)),
    "coder, several, no outer tag": Output(
        "qwen3_coder",
        "I look.\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>Paris</parameter>\n<parameter=days>\nmany\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        (("now", "{}"), ("get_weather", '{"city": "Paris", "days": "many"}')),
    ),
    "coder, cut": Output(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar\n",
        calls=(("get_weather", '{"city": "Par\\n'),),
    ),
    "coder, cut in a number": Output(
        "qwen3_coder", "<function=get_weather>\n<parameter=days>\n1", calls=(("get_weather", '{"days": 1'),)
    ),
    "coder, no end of the function": Output(
        "qwen3_coder",
        "<function=get_weather><parameter=city>a</parameter></tool_call>b",
        "b",
        (("get_weather", '{"city": "a"}'),),
    ),
    "coder, unknown": Output(
        "qwen3_coder", "<tool_call>\n<function=rm>\n</function>", "<tool_call>\n<function=rm>\n</function>"
    ),
    "coder, JSON": Output("qwen3_coder", tagged(NOW), tagged(NOW)),
    "generic, hermes": Output("generic", "x" + tagged(WEATHER), "x", (("get_weather", PARIS),)),
    "generic, coder": Output("generic", CODER, calls=(("write_file", CODER_ARGUMENTS),)),
    "generic, mistral": Output("generic", "[TOOL_CALLS]now[ARGS]{}", calls=(("now", "{}"),)),
    "generic, llama": Output("generic", f"<|python_tag|>{NOW}", calls=(("now", "{}"),)),
    "generic, an object": Output("generic", f" {NOW} ", calls=(("now", "{}"),)),
    "generic, an array": Output(
        "generic", f"[{NOW},\n{WEATHER}]", calls=(("now", "{}"), ("get_weather", PARIS))
    ),
    "generic, other JSON": Output("generic", '[{"name": "Ann"}]', '[{"name": "Ann"}]'),
    "required": Output(
        "hermes",
        f'[{{"name": "get_weather", "parameters": {PARIS}}}, {NOW}]',
        calls=(("get_weather", PARIS), ("now", "{}")),
        choice="required",
    ),
    "required, no format": Output(None, f"\n[ {NOW} ]\n", calls=(("now", "{}"),), choice="required"),
    "required, cut off between calls": Output(
        None, f'[{NOW}, {{"na', calls=(("now", "{}"),), choice="required"
    ),
    "required, cut off before a call": Output(None, '[{"na', '[{"na', choice="required"),
    "required, not kept": Output(None, "I [cannot]", "I [cannot]", choice="required"),
    "named": Output(
        "hermes", f" {TRICKY}\n", calls=(("get_weather", TRICKY + "\n"),), choice=NamedFunction("get_weather")
    ),
    "named, with reasoning": Output(
        None,
        "<think>Hm</think>\n{}",
        calls=(("now", "{}"),),
        reasoning="Hm",
        tags="think",
        choice=NamedFunction("now"),
    ),
    "named, nothing": Output(None, "", choice=NamedFunction("now")),
}
