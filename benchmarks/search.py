"""Exact search beside faiss: 64 queries on 200,000 rows, and one query on a million, both of 512 dimensions.

The vectors are 2,000 centres and 1.2 times as much noise, normalised; queries are stored vectors with 0.03 of noise. All
candidates hold their index already; the time to make one is told beside the ratios. Right is the order of fp64 scores,
equal ones by row: the error is one minus the recall of the first ten.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/search.py
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import cases
import timing

timing.wait_passively()

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from chiasm.tasks.int8_scan import compiled_product, torch_product  # noqa: E402
from chiasm.tasks.retrieval import Searcher  # noqa: E402
from chiasm.types import Embeddings, Space  # noqa: E402

PEER = "faiss-cpu IndexFlatIP fp32"
DIM, K, THREADS = 512, 10, 2
RIVAL_QUERIES = 128  # that the recall of the others is told of
Vectors = NDArray[np.float32]


def make_vectors(n: int, seed: int = 0) -> Vectors:
    """Return (n, 512) unit rows around 2,000 centres."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((2000, DIM), dtype=np.float32)
    vectors = np.empty((n, DIM), np.float32)
    for first in range(0, n, 50_000):
        part = vectors[first : first + 50_000]
        part[:] = centres[draw.integers(0, 2000, len(part))]
        part += np.float32(1.2) * draw.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def make_queries(vectors: Vectors, count: int, seed: int = 1) -> Vectors:
    draw = np.random.default_rng(seed)
    queries = vectors[draw.integers(0, len(vectors), count)]
    queries = queries + np.float32(0.03) * draw.standard_normal(queries.shape, dtype=np.float32)
    return np.ascontiguousarray(queries / np.linalg.norm(queries, axis=1, keepdims=True))


def as_embeddings(vectors: Vectors, prefix: str) -> Embeddings:
    ids = tuple(f"{prefix}{i}" for i in range(len(vectors)))
    return Embeddings(vectors, ids, Space("made", "0", "0", DIM), "image")


def truth(queries: Vectors, vectors: Vectors) -> NDArray[np.int64]:
    """Return the first ten rows by fp64 scores, equal ones by row, without anything of chiasm."""
    best = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0))
    exact = queries.astype(np.float64)
    for first in range(0, len(vectors), 8192):
        block = exact @ vectors[first : first + 8192].astype(np.float64).T
        rows = np.argpartition(-block, min(4 * K, block.shape[1] - 1), axis=1)[:, : 4 * K]
        best = np.concatenate([best, rows + first], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(block, rows, axis=1)], axis=1)
        order = np.lexsort((best, -scores), axis=1)[:, : 4 * K]
        best, scores = (np.take_along_axis(a, order, axis=1) for a in (best, scores))
    return best[:, :K]


def recall(found: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    """Return the share of the right rows that were found, in any order."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), right.tolist(), strict=False)]))


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = time.process_time(), time.perf_counter()
    made = call()
    return made, {"cpu_s": round(time.process_time() - cpu, 3), "wall_s": round(time.perf_counter() - wall, 3)}


def scalar(kind: int, vectors: Vectors) -> Any:
    index = faiss.IndexScalarQuantizer(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:20_000])
    index.add(vectors)
    return index


def flat_index(vectors: Vectors) -> Any:
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    return index


def torch_search(queries: Vectors, vectors: Vectors) -> NDArray[np.int64]:
    return torch.topk(torch.from_numpy(queries) @ torch.from_numpy(vectors).T, K, dim=1).indices.numpy()


def numpy_search(queries: Vectors, vectors: Vectors) -> NDArray[np.int64]:
    scores = queries @ vectors.T
    rows = np.argpartition(scores, -K, axis=1)[:, -K:]
    order = np.argsort(-np.take_along_axis(scores, rows, axis=1), axis=1)
    return np.take_along_axis(rows, order, axis=1)


def measure(name: str, rows: int, queries: int, checked: int, repetitions: int) -> cases.Case:
    """Time one row of the table; recall is over ``checked`` queries of the same kind."""
    index, made = {}, {}
    vectors = make_vectors(rows)
    # faiss keeps a copy of its own; the others, chiasm among them, read this copy.
    index["flat"], made["faiss-cpu IndexFlatIP"] = timed(lambda: flat_index(vectors))
    vectors = faiss.rev_swig_ptr(index["flat"].get_xb(), rows * DIM).reshape(rows, DIM)
    gc.collect()
    kinds = {"SQfp16": faiss.ScalarQuantizer.QT_fp16, "SQ8": faiss.ScalarQuantizer.QT_8bit}
    for kind, number in kinds.items():
        index[kind], made[f"faiss-cpu {kind}"] = timed(lambda number=number: scalar(number, vectors))
    corpus = as_embeddings(vectors, "c")
    searcher, made["chiasm"] = timed(lambda: Searcher(corpus, engine="int8"))

    def candidates(q: Vectors) -> dict[str, Callable[[], NDArray[np.int64]]]:
        asked = as_embeddings(q, "q")
        return {
            PEER: lambda: index["flat"].search(q, K)[1],
            "chiasm": lambda: searcher.search(asked, K).rows,
            "torch GEMM and topk": lambda: torch_search(q, vectors),
            "numpy GEMM and argpartition": lambda: numpy_search(q, vectors),
            "faiss-cpu SQfp16": lambda: index["SQfp16"].search(q, K)[1],
            "faiss-cpu SQ8": lambda: index["SQ8"].search(q, K)[1],
            "chiasm fp32, no index": lambda: fp32.search(asked, K).rows,
        }

    fp32 = Searcher(corpus, engine="fp32")
    many = make_queries(vectors, checked, seed=2)
    right = truth(many, vectors)
    found: dict[str, list[NDArray[np.int64]]] = {}
    for first in range(0, checked, queries):
        for key, call in candidates(many[first : first + queries]).items():
            if key == "chiasm" or first < RIVAL_QUERIES:
                found.setdefault(key, []).append(call())
    recalls = {key: round(recall(np.concatenate(parts), right), 4) for key, parts in found.items()}
    in_order = bool(np.array_equal(np.concatenate(found["chiasm"]), right))
    calls = candidates(make_queries(vectors, queries))
    measured = timing.interleave(calls, repetitions)
    return cases.compare(
        name, PEER, measured, error=1 - recalls["chiasm"], error_kind="1 - recall@10", error_bound=0.0,
        rivals={key: None for key in calls if key not in (PEER, "chiasm")},
        details={
            "rows": rows, "queries": queries, "dim": DIM, "checked_queries": checked, "rival_queries": min(checked, RIVAL_QUERIES), "recall_at_10": recalls,
            "same_rows_in_the_same_order": in_order, "index_made_in": made,
            "engine": "kernel" if compiled_product() else "torch" if torch_product() else "fp32",
        },
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    options = parser.parse_args()
    faiss.omp_set_num_threads(THREADS)
    torch.set_num_threads(THREADS)
    wanted = {"search_batch": (200_000, 64, 1024), "search_single": (1_000_000, 1, 8)}
    rows = []
    for name, (n, queries, checked) in wanted.items():
        if not options.case or name in options.case:
            rows.append(measure(name, n, queries, checked, options.repetitions))
            gc.collect()
    cases.report("search", rows, options, ["faiss-cpu"])


if __name__ == "__main__":
    main()
