"""Writes the labels that `wsiseg doctor` expects of the bundled model.

To be run once whenever wsiseg/models/zoo/glas-small.safetensors is replaced:

    python tests/write_expected_labels.py
"""

from wsiseg.cli.doctor_checks import MODEL, labels_of_model
from wsiseg.inference.selfcheck import digest, expected_path, write_expected
from wsiseg.models.zoo import BUNDLED

if __name__ == "__main__":
    path = expected_path(BUNDLED / f"{MODEL}.safetensors")
    labels, sha256, _ = labels_of_model("cpu")
    write_expected(path, labels, sha256=sha256)
    print(f"{path}: {digest(labels)} of model {sha256}")
