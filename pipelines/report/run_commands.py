"""How to run each output, for a model card: commands of llama.cpp, Ollama, vLLM, transformers and ONNX Runtime.

Sources: llama.cpp, tools/cli/README.md, tools/completion/README.md and tools/server/README.md (llama-cli is for chats
since the end of 2025, llama-completion for texts) and tools/gguf-split/README.md; vLLM, docs/features/quantization, and
Ollama, issue 5245, for models in several files; transformers, quantizers/
quantizer_{gptq,awq,compressed_tensors,bnb_4bit}.py for what must be installed; onnxruntime-genai, Python API.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantpress.convert.gguf.split import whole_path
from quantpress.pipelines.report.model_facts import ModelFacts
from quantpress.pipelines.report.modelfile import modelfile
from quantpress.pipelines.report.rows import Row
from quantpress.pipelines.report.values import items, mapping, plain, text

__all__ = ["Snippet", "snippets"]

_PACKAGES = {  # quant_method of config.json -> what transformers needs to load it
    "gptq": "optimum gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}
_PROMPT = "Once upon a time"
_QUESTION = "Why is the sky blue?"


@dataclass(frozen=True, slots=True)
class Snippet:
    """Lines to copy.

    Attributes:
        title: what runs them: "llama.cpp", ...
        language: of the lines, for the fence.
        code: the lines.
        note: what is to be known, or empty.
    """

    title: str
    language: str
    code: str
    note: str = ""


def snippets(row: Row, facts: ModelFacts, base_model: str) -> tuple[Snippet, ...]:
    """Gives what runs an output.

    Args:
        row: the output.
        facts: what it says of itself.
        base_model: Hub id of the source, or empty.

    Returns:
        Nothing for a kind that is not known here, or a name that cannot be written in a command.
    """
    if row.name != plain(row.output.path.rstrip("/").rpartition("/")[2]) or "\\" in row.name:
        return ()  # a name with characters that are not shown as they are
    if row.kind == "gguf":
        return _gguf(row, facts, base_model)
    if row.kind == "safetensors":
        return _safetensors(row, facts)
    return _onnx(row, facts) if row.kind == "onnx" else ()


def _gguf(row: Row, facts: ModelFacts, base_model: str) -> tuple[Snippet, ...]:
    file = shlex.quote(row.name)
    if facts.chat_template:
        first = f"llama-cli -m {file} -p {shlex.quote(_QUESTION)} --single-turn"
    else:
        first = f"llama-completion -m {file} -p {shlex.quote(_PROMPT)} -n 64 -no-cnv"
    context = f" -c {min(facts.context, 8192)}" if facts.context else ""
    whole, merge = _merged(row)
    tag = _model_tag(whole)
    found = [
        Snippet("llama.cpp", "bash", f"{first}\nllama-server -m {file}{context} --port 8080"),
        Snippet("Ollama: `Modelfile`", "", modelfile(whole, facts)),
        Snippet("Ollama", "bash", f"{merge}ollama create {tag} -f Modelfile\nollama run {tag}"),
    ]
    if base_model:
        serve = f"vllm serve ./{shlex.quote(whole)} --tokenizer {shlex.quote(base_model)}"
        install = "pip install vllm vllm-gguf-plugin"
        found.append(Snippet("vLLM", "bash", f"{merge}{install}\n{serve}", "vLLM calls its GGUF support experimental."))
    return tuple(found)


def _merged(row: Row) -> tuple[str, str]:
    """Gives the name of the model as one file, and what makes it of several: Ollama and vLLM take one file only."""
    if len(items(row.sidecar.get("outputs"))) < 2:
        return row.name, ""
    whole = whole_path(Path(row.name)).name
    return whole, f"llama-gguf-split --merge {shlex.quote(row.name)} {shlex.quote(whole)}\n"


def _model_tag(name: str) -> str:
    """Gives a name that Ollama takes: lower case letters, digits, and what may stand between them."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name.lower())
    return kept.removesuffix(".gguf").strip("._-") or "model"


def _safetensors(row: Row, facts: ModelFacts) -> tuple[Snippet, ...]:
    method = facts.quantization or _format(row)
    packages = " ".join(["transformers accelerate", *filter(None, [_PACKAGES.get(method, "")])])
    folder = f"./{row.name}"
    lines = [
        f"# pip install {packages}",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
        f'model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}, device_map="auto")',
        *_inputs(facts),
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    serve = f"pip install vllm\nvllm serve {shlex.quote(folder)}"
    note = "vLLM reads the format from config.json." if method else ""
    return (
        Snippet("transformers", "python", "\n".join(lines)),
        Snippet("vLLM", "bash", serve, note),
    )


def _inputs(facts: ModelFacts) -> Sequence[str]:
    if not facts.chat_template:
        return [f'inputs = tokenizer({json.dumps(_PROMPT)}, return_tensors="pt").to(model.device)']
    return [
        f'messages = [{{"role": "user", "content": {json.dumps(_QUESTION)}}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
    ]


def _format(row: Row) -> str:
    """Gives the format of packed weights, from the stage that wrote them; empty for plain ones."""
    stages = items(row.sidecar.get("stages"))
    options: Mapping[str, object] = mapping(stages[-1].get("options")) if stages else {}
    return text(options.get("format"), 40).removesuffix("_v2")


def _onnx(row: Row, facts: ModelFacts) -> tuple[Snippet, ...]:
    folder = f"./{row.name}"
    names = {text(item.get("name")) for item in items(row.sidecar.get("outputs"))}
    if "genai_config.json" not in names:
        lines = [
            "# pip install onnxruntime",
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({json.dumps(folder + '/model.onnx')})",
            "print([(value.name, value.shape, value.type) for value in session.get_inputs()])",
        ]
        return (Snippet("ONNX Runtime", "python", "\n".join(lines)),)
    prompt = [f"prompt = {json.dumps(_PROMPT)}"]
    if facts.chat_template:
        prompt = [
            f'messages = json.dumps([{{"role": "user", "content": {json.dumps(_QUESTION)}}}])',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
        ]
    lines = [
        "# pip install onnxruntime-genai",
        *(["import json", ""] if facts.chat_template else []),
        "import onnxruntime_genai as og",
        "",
        f"model = og.Model({json.dumps(folder)})",
        "tokenizer = og.Tokenizer(model)",
        *prompt,
        "params = og.GeneratorParams(model)",
        f"params.set_search_options(max_length={min(facts.context or 256, 256)})",
        "generator = og.Generator(model, params)",
        "generator.append_tokens(tokenizer.encode(prompt))",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    ]
    return (Snippet("ONNX Runtime (onnxruntime-genai)", "python", "\n".join(lines)),)
