"""llama-server's own reading of a command line, through the parser inside xllamacpp.

The parser is a C++ function that the shared object exports; xllamacpp's `CommonParams` carries the structure
that it fills. It runs in a process of its own, because llama.cpp ends the process when it dislikes a value.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_CHILD = r"""
import ctypes as C, importlib.util, json, shlex, sys, xllamacpp
(folder,) = importlib.util.find_spec("xllamacpp").submodule_search_locations
library = C.CDLL(folder + "/xllamacpp.abi3.so")
parse = library._Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E
parse.restype, parse.argtypes = C.c_bool, [C.c_int, C.POINTER(C.c_char_p), C.c_void_p, C.c_int, C.c_void_p]
params = xllamacpp.CommonParams()
start = id(params) + object.__basicsize__  # the structure lies in the object; it begins with n_predict, n_ctx
params.n_predict, params.n_ctx = 4321, 1234
assert list((C.c_int32 * 2).from_address(start)) == [4321, 1234], "xllamacpp: layout changed"
words = [word.encode() for word in shlex.split(sys.argv[1])]
good = parse(len(words), (C.c_char_p * (len(words) + 1))(*words, None), start, 12, None)  # 12: the server
print(json.dumps({
    "good": good, "model": params.model.path, "ctx": params.n_ctx, "parallel": params.n_parallel,
    "gpu_layers": params.n_gpu_layers, "flash": int(params.flash_attn_type),
    "cache_k": int(params.cache_type_k), "cache_v": int(params.cache_type_v),
    "overrides": params.tensor_buft_overrides,
}))
"""


def options(command: str) -> dict[str, Any]:
    """What llama-server would do with a command line; RuntimeError with its words when it refuses."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, command], capture_output=True, text=True, check=False, timeout=60
    )
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"good": False}
    if not found["good"]:
        raise RuntimeError(f"llama-server refuses {command!r}: {done.stderr.strip()[-500:]}")
    return dict(found)
