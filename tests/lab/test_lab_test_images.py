"""The hand-made container images."""

import hashlib
import io
import json
import tarfile

import pytest
from ds01_lab.testimages import IMAGES, docker_archive, layer

BY_NAME = {image.name: image for image in IMAGES}


def files(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}


def made(name):
    return layer(BY_NAME[name], b"busybox", b"bash", ["ls", "su", "adduser", "bash"])


@pytest.mark.parametrize("name", BY_NAME)
def test_the_same_inputs_make_the_same_image(name):
    assert docker_archive(BY_NAME[name], made(name)) == docker_archive(BY_NAME[name], made(name))


@pytest.mark.parametrize("name", BY_NAME)
def test_an_archive_is_what_docker_load_reads(name):
    image_id, content = docker_archive(BY_NAME[name], made(name))
    found = files(content)
    (manifest,) = json.loads(found["manifest.json"])
    config = found[manifest["Config"]]
    assert manifest["RepoTags"] == [f"ds01-lab/{name}:latest"]
    assert image_id == f"sha256:{hashlib.sha256(config).hexdigest()}"
    (layer_id,) = json.loads(config)["rootfs"]["diff_ids"]
    assert layer_id == f"sha256:{hashlib.sha256(found[manifest['Layers'][0]]).hexdigest()}"


def test_minimal_has_no_accounts_and_no_way_to_make_any():
    with tarfile.open(fileobj=io.BytesIO(made("minimal"))) as tar:
        names = set(tar.getnames())
    assert "bin/ls" in names
    assert not names & {"etc/passwd", "etc/group", "bin/bash", "bin/adduser", "bin/su"}


def test_conflict_occupies_an_id_and_a_name_of_real_users():
    passwd = files(made("conflict"))["etc/passwd"].decode()
    assert "ubuntu:x:2001:2001::/home/ubuntu:" in passwd
    assert "bob:x:1500:1500:" in passwd
