"""Distributions read from the model itself: the teacher's own, and the same bytes whenever they are read."""

from pathlib import Path

import torch
from toys import kept_rows, save_model

from infra.models import load_model, local_folder
from infra.store import LocalStore
from kernels.codec import decode
from tasks.reader import Reader

torch.set_num_threads(1)
SETTINGS = {"type": "sampled", "grain": 0.01, "resolution": 55}


def test_what_is_read_are_the_models_distributions(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ref = save_model(store, "teacher", seed=3, spread=0.3)
    rows = kept_rows(11).to_pydict()
    reader = Reader(store.uri, ref.model_dump(), gpu=False)
    given = rows["prompt_token_ids"], rows["token_ids"], list(range(11))
    blobs = reader.encode(*given, SETTINGS)
    assert blobs == reader.encode(*given, SETTINGS)
    assert [len(decode([blob]).lengths) for blob in blobs] == [1] * 11
    model = load_model(local_folder(store, ref), "float32")
    for prompt, response, blob in zip(*given[:2], blobs, strict=True):
        found = decode([blob])
        assert found.lengths == [len(response)]
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected_TK = logits_TV.log_softmax(-1).gather(-1, found.ids_NK)
        assert found.importance_NK is not None
        certain_TK = found.importance_NK == 1
        assert certain_TK.any()
        torch.testing.assert_close(found.logprobs_NK[certain_TK], expected_TK[certain_TK], rtol=0.01, atol=0.05)
