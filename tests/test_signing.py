"""Signatures of task files: what is signed, who counts, and that nothing that was changed does."""

import base64
import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from client import signing as files
from client.main import app
from client.task_file import read_task
from common import signing
from common.errors import BadTaskError, LydianError
from common.messages import JobRequest, JobSpec, TaskRef, TaskSignature
from common.signing import Signer, sign, signer_in, signers_in, whos, why_unsigned
from worker import plan
from worker.signers import Signers, checked

TASK = "def model(config): ...\ndef dataset(config, split): ...\n"
DIGEST = hashlib.sha256(TASK.encode()).hexdigest()
OTHER = "0" * 64

# RFC 8032, section 7.1, test 1: the secret key, and the public key that belongs to it.
PRIVATE = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
)
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
ADA = Signer("ada", PUBLIC)
EVE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EVE = Signer("eve", EVE_KEY.public_key().public_bytes_raw())
SIGNED = sign(DIGEST, "ada", PRIVATE)


NAMES = st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEF0123456789._-", min_size=1, max_size=63)


def ref(*signatures: TaskSignature, digest: str = DIGEST) -> TaskRef:
    return TaskRef(name="mine", digest=digest, signatures=signatures)


# ---------------------------------------------------------------- what is signed


def test_what_is_signed_is_the_domain_the_digest_and_the_name_and_ed25519_as_in_rfc_8032() -> None:
    message = b"lydian-task-v1\0" + bytes.fromhex(DIGEST) + b"ada"
    raw = base64.urlsafe_b64decode(SIGNED.signature + "==")
    assert raw == PRIVATE.sign(message)
    PRIVATE.public_key().verify(raw, message)
    assert SIGNED.key == hashlib.sha256(PUBLIC).hexdigest()[:16] == ADA.id


def test_a_signature_of_a_listed_key_counts_and_of_no_other_key() -> None:
    assert why_unsigned(ref(SIGNED), [EVE, ADA]) == ""
    assert why_unsigned(ref(SIGNED), [EVE]) == (
        f"task mine ({DIGEST[:12]}…) has no signature that counts here: "
        f"it is signed by ada (key {ADA.id}), whose key is not listed here"
    )
    assert why_unsigned(ref(), [ADA]) == f"task mine ({DIGEST[:12]}…) is not signed"


def test_one_that_counts_is_enough_whatever_stands_beside_it() -> None:
    broken = SIGNED.model_copy(update={"name": "bob"})
    of_another = sign(OTHER, "ada", PRIVATE)
    assert why_unsigned(ref(broken, of_another, sign(DIGEST, "eve", EVE_KEY), SIGNED), [ADA]) == ""


def test_the_signature_of_another_file_is_told_as_that() -> None:
    assert f"ada (key {ADA.id}) signed another file (000000000000…)" in why_unsigned(
        ref(sign(OTHER, "ada", PRIVATE)), [ADA]
    )


def test_a_signature_under_the_id_of_a_listed_key_by_another_key_is_told_as_not_right() -> None:
    forged = sign(DIGEST, "ada", EVE_KEY).model_copy(update={"key": ADA.id})
    assert f"the signature of ada (key {ADA.id}) is not right" in why_unsigned(ref(forged), [ADA])


@given(st.integers(min_value=0, max_value=511))
def test_any_flipped_bit_of_a_signature_is_refused(bit: int) -> None:
    raw = bytearray(base64.urlsafe_b64decode(SIGNED.signature + "=="))
    raw[bit // 8] ^= 1 << bit % 8
    changed = base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()
    assert why_unsigned(ref(SIGNED.model_copy(update={"signature": changed})), [ADA, EVE])


@given(st.integers(min_value=0, max_value=255), st.booleans())
def test_any_flipped_bit_of_the_digest_is_refused_in_the_task_and_in_the_signature_or_both(
    bit: int, both: bool
) -> None:
    raw = bytearray(bytes.fromhex(DIGEST))
    raw[bit // 8] ^= 1 << bit % 8
    changed = bytes(raw).hex()
    assert why_unsigned(ref(SIGNED, digest=changed), [ADA])
    moved = SIGNED.model_copy(update={"digest": changed})
    assert why_unsigned(ref(moved, digest=changed if both else DIGEST), [ADA])


@given(NAMES)
def test_a_signature_counts_under_no_other_name(name: str) -> None:
    counts = not why_unsigned(ref(SIGNED.model_copy(update={"name": name})), [ADA])
    assert counts == (name == "ada")


@given(st.integers(min_value=0, max_value=255))
def test_a_key_with_a_flipped_bit_makes_no_signature_right(bit: int) -> None:
    raw = bytearray(PUBLIC)
    raw[bit // 8] ^= 1 << bit % 8
    other = Signer("ada", bytes(raw))
    under_its_id = SIGNED.model_copy(update={"key": other.id})
    assert why_unsigned(ref(under_its_id), [other])


def test_a_second_spelling_of_the_same_signature_does_not_count() -> None:
    last = SIGNED.signature[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = alphabet[alphabet.index(last) ^ 1]  # the last letter has four bits of no meaning
    assert why_unsigned(ref(SIGNED.model_copy(update={"signature": SIGNED.signature[:-1] + other})), [ADA])


def test_who_signed_is_told_by_name_and_key() -> None:
    assert whos([SIGNED, SIGNED]) == f"ada (key {ADA.id}), ada (key {ADA.id})"


# ---------------------------------------------------------------- keys on a line


@given(st.binary(min_size=32, max_size=32), NAMES)
def test_a_key_comes_back_from_its_line(public: bytes, name: str) -> None:
    signer = Signer(name, public)
    assert signer_in(f" {signer.line}\n") == signer
    assert not signer.line.startswith("lyd_")  # what does is a secret


@pytest.mark.parametrize(
    "line",
    ["", "lydkey_ada_short", f"lyd_key_ada_{ADA.line[-43:]}", ADA.line + "x", ADA.line[:-1] + "%",
     f"lydkey_a/b_{ADA.line[-43:]}", ADA.line[:-1] + chr(ord(ADA.line[-1]) + 1)],
)  # fmt: skip
def test_what_is_no_key_is_refused_with_what_one_looks_like(line: str) -> None:
    with pytest.raises(LydianError) as caught:
        signer_in(line)
    assert caught.value.code == "bad_key"
    assert "lydian sign --new-key" in caught.value.lines()


def test_a_list_of_keys_has_comments_and_names_the_line_that_is_none() -> None:
    assert signers_in(f"# mine\n\n{ADA.line}  # on the laptop\n{EVE.line}\n{ADA.line}\n", "s") == (ADA, EVE)
    with pytest.raises(LydianError, match=r"signers\.txt, line 2: 'nonsense'"):
        signers_in(f"{ADA.line}\nnonsense\n", "signers.txt")


# ---------------------------------------------------------------- a worker's owner


def test_signed_takes_signed_and_listed_files_and_refuses_all_others_with_what_to_do() -> None:
    def refused(task: TaskRef, **given: object) -> plan.Refusal | None:
        rules = {"builtin": {"digits"}, "trust": "signed", "trusted": (), "signers": (ADA,), **given}
        return plan.refusal(task, **rules)  # type: ignore[arg-type]

    assert refused(ref(SIGNED)) is None
    assert refused(ref(), trusted=(DIGEST,)) is None
    assert refused(TaskRef(name="digits")) is None
    for task in (ref(), ref(sign(DIGEST, "eve", EVE_KEY)), ref(SIGNED, digest=OTHER)):
        found = refused(task)
        assert found is not None
        assert found.code == "not_trusted"
        assert "--signer" in found.sentence
        assert "--allow FILE" in found.sentence
    assert refused(ref(SIGNED), trust="listed") is not None
    assert refused(ref(SIGNED), trust="none") is not None


def test_a_line_that_is_taken_out_of_the_file_counts_no_more_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "signers.txt"
    file.write_text(f"{ADA.line}\n{EVE.line}\n")
    signers = checked("signed", Signers(file=file))
    assert signers.now() == (ADA, EVE)
    file.write_text(f"{EVE.line}\n")
    assert signers.now() == (EVE,)
    file.write_text("garbage\n")
    with pytest.raises(LydianError, match=r"line 1"):
        signers.now()
    file.unlink()
    with pytest.raises(LydianError, match="cannot be read"):
        signers.now()


def test_signers_that_could_not_count_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LydianError, match="names nobody"):
        checked("signed", Signers())
    with pytest.raises(LydianError, match="count with --trust signed, and trust is listed"):
        checked("listed", Signers((ADA.line,)))
    assert checked("none", Signers()) == Signers()
    monkeypatch.setattr("worker.signers.unavailable", lambda: "signatures need the package cryptography")
    with pytest.raises(LydianError, match="cryptography"):
        checked("signed", Signers((ADA.line,)))


def test_a_machine_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signing.unavailable() == ""
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    assert "pip install 'cryptography>=42'" in signing.unavailable()


# ---------------------------------------------------------------- lydian sign


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(TASK)
    return file


def key(folder: Path, name: str) -> tuple[Path, Signer]:
    result = CliRunner().invoke(app, ["sign", "--new-key", str(folder / f"{name}.key")])
    assert result.exit_code == 0, result.output
    return folder / f"{name}.key", signer_in(result.stdout)


def test_a_new_key_is_its_owners_alone_and_is_never_written_over(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path, signer = key(tmp_path / "new", "ada")
    finally:
        os.umask(before)
    assert (signer.name, stat.S_IMODE(path.stat().st_mode)) == ("ada", 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    content = path.read_bytes()
    with pytest.raises(LydianError, match="is there already"):
        files.new_key(path)
    assert path.read_bytes() == content


def test_what_one_signs_another_machine_finds_beside_the_file_and_sends(tmp_path: Path, task: Path) -> None:
    (ada, ada_key), (bob, bob_key) = key(tmp_path, "ada"), key(tmp_path, "bob")
    for path in (ada, bob, ada):  # once each, however often
        result = CliRunner().invoke(app, ["sign", str(task), "--key", str(path)])
        assert result.stdout == f"{task}.sig\n", result.output
    found = files.read_signatures(task, read_task(task))
    assert {one.name for one in found} == {"ada", "bob"}
    assert len(found) == 2
    for signer in (ada_key, bob_key):
        assert why_unsigned(ref(*found), [signer]) == ""


def test_a_file_that_changed_since_it_was_signed_is_not_sent_and_is_signed_anew_alone(
    tmp_path: Path, task: Path
) -> None:
    (ada, _), (bob, _) = key(tmp_path, "ada"), key(tmp_path, "bob")
    files.sign_file(task, ada)
    task.write_text(TASK + "# changed\n")
    with pytest.raises(BadTaskError, match=r"mine\.py\.sig is of another version of mine\.py"):
        files.read_signatures(task, read_task(task))
    files.sign_file(task, bob)
    assert [one.name for one in files.read_signatures(task, read_task(task))] == ["bob"]


def test_no_file_of_signatures_is_no_signature_and_a_spoilt_one_is_an_error(tmp_path: Path, task: Path) -> None:
    assert files.read_signatures(task, TASK) == ()
    beside = files.signatures_path(task)
    for text in ("", "sha256\n", f"sha256 {DIGEST}\n", f"sha256 {DIGEST}\nada x y\n", "ü\n", "md5 x\nada k s\n"):
        beside.write_text(text)
        with pytest.raises(BadTaskError, match=r"signatures in .* cannot be read"):
            files.read_signatures(task, TASK)


def test_a_key_that_others_can_read_or_that_is_none_does_not_sign(tmp_path: Path, task: Path) -> None:
    path, _ = key(tmp_path, "ada")
    path.chmod(0o640)
    with pytest.raises(LydianError, match=r"others may read it \(mode 640\)"):
        files.sign_file(task, path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(LydianError, match="no private key"):
        files.sign_file(task, path)
    with pytest.raises(LydianError, match="cannot be read"):
        files.sign_file(task, tmp_path / "absent.key")
    assert not files.signatures_path(task).exists()


def test_the_only_key_of_a_user_needs_no_naming(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "key_folder", lambda: tmp_path)
    with pytest.raises(LydianError, match="there is no key"):
        files.sign_file(task, None)
    _, signer = key(tmp_path, "ada")
    assert files.sign_file(task, None)[1] == signer
    key(tmp_path, "bob")
    with pytest.raises(LydianError, match="2 keys are in"):
        files.sign_file(task, None)


def test_signatures_go_with_a_task_file_and_never_alone() -> None:
    assert JobRequest(spec=JobSpec(task="t"), task_source=TASK, signatures=(SIGNED,), key="k").signatures == (SIGNED,)
    with pytest.raises(ValidationError, match="signatures are of a task file, and none was sent"):
        JobRequest(spec=JobSpec(task="digits"), signatures=(SIGNED,), key="k")
