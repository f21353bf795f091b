"""llama.cpp in a process of its own: tokens of texts, logits, and what the projector makes of an image.

Run by an interpreter that has llama_cpp, which needs nothing of this project: ``python llama_program.py`` reads a
request from standard input and writes an answer as its last line, both JSON.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    # Without the repacked layouts: what is compared are products with the blocks as they lie in the file, and the tiles
    # of some processors (AMX) are there by name alone in virtual machines.
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False
    llama_cpp.llama_cpp.llama_model_default_params = lambda: parameters
    caches = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(request["model"], n_ctx=256, n_threads=1, logits_all=True, verbose=False, **caches)
    answer = {"tokens": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]}
    if request.get("ids"):
        llama.eval(request["ids"])
        np.save(request["logits"], np.array(llama.scores[: len(request["ids"])]))
    if "mmproj" in request:
        np.save(request["embedded"], embedded(llama, request["mmproj"], np.load(request["image"])))
    print(json.dumps(answer))


def embedded(llama: llama_cpp.Llama, mmproj: str, image: np.ndarray) -> np.ndarray:
    """Return the projector's output (tokens, D) for an image (height, width, 3), uint8."""
    from llama_cpp import mtmd_cpp as mtmd

    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu, parameters.n_threads, parameters.warmup = False, 1, False
    context = mtmd.mtmd_init_from_file(mmproj.encode(), llama.model, parameters)
    assert context, "the file of vision and projector cannot be loaded"
    pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes())
    bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    chunks = mtmd.mtmd_input_chunks_init()
    failed = mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
    assert not failed, failed
    for number in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, number)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert not mtmd.mtmd_encode_chunk(context, chunk)
            rows = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            columns = llama.n_embd()
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (rows * columns,)).reshape(rows, -1).copy()
    raise AssertionError("no image among the chunks")


main()
