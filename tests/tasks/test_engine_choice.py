"""Which engine serves other weights: the one that runs, unless they are of another shape."""

import json

from infra.models import ModelRef
from infra.store import LocalStore
from tasks.engines import served_by

SHAPE = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_weights_of_another_shape_get_an_engine_of_their_own(tmp_path):
    store = LocalStore(tmp_path)

    def model(name: str, **config: object) -> ModelRef:
        store.write(f"{name}/config.json", json.dumps(SHAPE | config).encode())
        return ModelRef(name=name, revision=name, path=name)

    base = model("base")
    # What a library writes beside the shape, or spells out when it saves, makes no difference.
    saved = model("saved", head_dim=32, transformers_version="9", dtype="bfloat16", intermediate_size=128)
    deeper = model("deeper", num_hidden_layers=3)
    assert served_by(store, base, base) is base
    assert served_by(store, base, saved) is base
    assert served_by(store, base, deeper) is deeper
