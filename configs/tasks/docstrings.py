"""The first line of a function's docstring and its code: written by the model, chosen among four, and retrieved.

    t5g2 evaluate --model=DIR --tasks=docstrings --out=DIR         200 functions
    t5g2 evaluate --model=DIR --tasks=docstrings:50 --out=DIR      50

Functions of the standard library that ships with every Python, of the modules that no training here reads (PythonText,
split "heldout"); so the records differ a little between versions of Python. Nothing is downloaded. `docstrings/rouge1`,
… compare what is generated with the docstring; `docstring_choice/accuracy`, … are shares of 1, and 0.25 is chance.
`docstring_retrieval/query_to_text@k` is the share of functions whose docstring is among the k nearest of all.
"""

import ast
import random

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import ChooseByLikelihood, GenerateAndCompare, TextRetrieval

LONGEST_CHARACTERS = 1200


def functions():
    """Returns the code of each function without its docstring, and the docstring's first line, in a fixed order."""
    records = []
    documents = PythonText(split="heldout").open()
    for number in range(len(documents)):
        try:
            module = ast.parse(documents[number])
        except SyntaxError:  # a topic of the language reference
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)) and len(node.body) > 1:
                node.body = node.body[1:]
                code, [line, *_] = ast.unparse(node), docstring.splitlines()
                if len(code) <= LONGEST_CHARACTERS and len(line) >= 20:
                    records.append({"code": code, "docstring": line.strip()})
    return records


def get_tasks(examples: str = "200"):
    draw = random.Random(0)
    records = functions()
    lines = [record["docstring"] for record in records]
    for record in records:
        others = draw.sample([line for line in lines if line != record["docstring"]], 3)
        record["choices"] = draw.sample([record["docstring"], *others], 4)
    shared = {"data": records, "examples": int(examples), "template": "{code}\n\nThe function above in one line:"}
    return [
        GenerateAndCompare(
            **shared,
            name="docstrings",
            reference="{docstring}",
            # without examples a small pretrained model ends the line at once
            shots=2,
            metrics=("rouge", "chrf", "token_f1"),
            max_new_tokens=48,
            stop=("\n",),
        ),
        ChooseByLikelihood(**shared, name="docstring_choice", choices="{choices}", answer="{docstring}"),
        TextRetrieval(**shared | {"template": "{code}"}, name="docstring_retrieval", texts="{docstring}"),
    ]
