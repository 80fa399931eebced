import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from swarmnode.cli.weights_hash import weights_sha256
from swarmnode.errors import DataError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.ones(4, dtype=np.float16)


def test_the_hash_is_over_name_dtype_shape_and_bytes_in_order_of_names(tmp_path: Path) -> None:
    save_file({"b": B, "a": A}, tmp_path / "model.safetensors")
    said = b'["a","F32",[2,3]]\n' + A.tobytes() + b'["b","F16",[4]]\n' + B.tobytes()
    assert weights_sha256(tmp_path) == hashlib.sha256(said).hexdigest()


def test_files_do_not_matter_and_everything_else_does(tmp_path: Path) -> None:
    def digest(
        name: str, *files: dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.floating]]"]
    ) -> str:
        (tmp_path / name).mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, tmp_path / name / f"{number}.safetensors")
        return weights_sha256(tmp_path / name)

    other = A.copy()
    other[1, 2] = np.nextafter(other[1, 2], np.float32(9))
    whole = digest("whole", {"a": A, "b": B})
    assert digest("cut", {"b": B}, {"a": A}) == whole
    changed = [
        digest("bit", {"a": other, "b": B}),
        digest("shape", {"a": A.reshape(3, 2), "b": B}),
        digest("dtype", {"a": A, "b": B.view(np.int16)}),
        digest("name", {"a": A, "c": B}),
    ]
    assert len({whole, *changed}) == 5


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        weights_sha256(tmp_path)
