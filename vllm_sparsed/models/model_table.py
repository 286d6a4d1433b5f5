"""The tables of models in README and docs; this module as a program prints them."""

from vllm_sparsed.models.registry import ENTRIES, UNSERVED


def served_table() -> str:
    """What is served, as a Markdown table, for the README."""
    lines = [
        "| Architecture | Checkpoints | Default algorithm | Mask, end of text | Chat template |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{entry.architecture}` | {entry.checkpoints} | `{entry.algorithm}` "
        f"| {entry.mask_token_id}, {entry.eos_token_id} | {entry.chat_template} |"
        for entry in ENTRIES
    ]
    return "\n".join(lines) + "\n"


def settings_table() -> str:
    """What each family is usually decoded with, as a Markdown table, for the docs."""
    lines = ["| Architecture | Logits of row p | Usual settings |", "|---|---|---|"]
    for entry in ENTRIES:
        row = "position p + 1" if entry.logit_shift else "position p"
        lines.append(f"| `{entry.architecture}` | {row} | {entry.settings} |")
    return "\n".join(lines) + "\n"


def unserved_table() -> str:
    """What is refused by name, as a Markdown table, for the docs."""
    lines = ["| Model | Why not | Served by |", "|---|---|---|"]
    lines += [f"| {model.name} | {model.reason} | {model.served_by or '-'} |" for model in UNSERVED]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(served_table(), settings_table(), unserved_table(), sep="\n", end="")
