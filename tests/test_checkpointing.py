"""Checkpoints: what comes back is what went in; damage falls back to an older one, and says so."""

import errno
import json
import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from cxa_jax.checkpointing import Checkpoints, load_backbone, read_first
from cxa_jax.errors import UserError
from cxa_jax.interruption import Interrupted, end_on_signal
from cxa_jax.train_state import TrainState


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        healthy=jnp.ones((), bool),
        params={"dense": {"kernel": draw(3, 4), "bias": draw(4)}},
        batch_stats={"norm": {"mean": draw(4)}},
        opt_state=({"kernel": draw(3, 4)}, ()),
    )


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def test_round_trip_bit_for_bit(tmp_path):
    state = make_state(7)
    meta = {"loss": float("nan"), "best": float("inf"), "rows": [{"a": 1}], "text": "é"}
    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(state, meta)
    with Checkpoints(tmp_path, "latest") as checkpoints:
        restored, restored_meta = checkpoints.restore(abstract(make_state(0)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert np.isnan(restored_meta.pop("loss")) and np.isnan(meta.pop("loss"))
    assert restored_meta == meta


def test_empty_workdir_has_nothing(tmp_path):
    with Checkpoints(tmp_path, "best") as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None
        assert checkpoints.read_meta() is None


def test_only_the_newest_are_kept_and_a_redone_step_replaces_itself(tmp_path):
    with Checkpoints(tmp_path, "latest", num_kept=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), {"try": 1})
        assert checkpoints.steps() == [3, 2]
        checkpoints.save(make_state(2), {"try": 2})  # a resumed run is at step 2 again
        assert checkpoints.steps()[0] == 2
        assert checkpoints.read_meta() == {"try": 2}


@pytest.mark.parametrize("how", ["killed", "full disk"])
def test_a_state_is_kept_until_what_replaces_it_is_whole(tmp_path, monkeypatch, how):
    """Step 3 was saved by a signal on the dev split; it is written once more, and that does not end."""
    with Checkpoints(tmp_path, "latest") as checkpoints:
        for step in (2, 3):
            checkpoints.save(make_state(step), {"try": 1})

    def fail(*_, **__):
        raise KeyboardInterrupt if how == "killed" else OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
        with pytest.raises(KeyboardInterrupt if how == "killed" else UserError):
            with Checkpoints(tmp_path, "latest") as checkpoints:
                checkpoints.save(make_state(3), {"try": 2})
    assert not (tmp_path / "checkpoints/latest/3").exists()
    with Checkpoints(tmp_path, "latest") as checkpoints:
        assert checkpoints.steps() == [3, 2] and checkpoints.read_meta() == {"try": 1}
        state, _ = checkpoints.restore(abstract(make_state(0)))
        jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
        checkpoints.save(make_state(3), {"try": 2})
    with Checkpoints(tmp_path, "latest", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 2] and checkpoints.read_meta() == {"try": 2}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["latest"]


@pytest.mark.parametrize("work", ["restore", "save", "wait_until_finished"])
def test_a_signal_waits_until_orbax_has_ended(tmp_path, monkeypatch, work):
    """Its event loops drop what a signal raises in their callbacks, and then wait for ever."""
    original, ended = getattr(orbax.checkpoint.CheckpointManager, work), []

    def send_signal(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        result = original(*arguments, **options)
        ended.append(True)
        return result

    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(orbax.checkpoint.CheckpointManager, work, send_signal)
        with pytest.raises(Interrupted), end_on_signal():
            checkpoints.restore(abstract(make_state(0))) if work == "restore" else checkpoints.save(make_state(2), {})
            checkpoints.wait()
        monkeypatch.undo()
    assert ended


def test_a_replacement_that_ended_is_not_undone(tmp_path):
    """Killed between the new state's last byte and the end of the old one."""
    with Checkpoints(tmp_path, "best") as checkpoints:
        checkpoints.save(make_state(5), {"try": 1})
    aside = tmp_path / "checkpoints/best.replaced/3"
    aside.mkdir(parents=True)
    (tmp_path / "checkpoints/best/5").rename(aside / "5")
    with Checkpoints(tmp_path / "other", "best") as checkpoints:
        checkpoints.save(make_state(3), {"try": 2})
    (tmp_path / "other/checkpoints/best/3").rename(tmp_path / "checkpoints/best/3")
    with Checkpoints(tmp_path, "best") as checkpoints:
        assert checkpoints.steps() == [3] and checkpoints.read_meta() == {"try": 2}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best"]


def test_variables_alone(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path, "best") as checkpoints:
        checkpoints.save(state, {})
        mould = abstract(state)
        variables, _ = checkpoints.restore_variables({"params": mould.params, "batch_stats": mould.batch_stats})
    jax.tree.map(np.testing.assert_array_equal, variables, state.variables)


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damage_falls_back_to_the_older_and_says_so(tmp_path, caplog):
    with Checkpoints(tmp_path, "latest", num_kept=2) as checkpoints:
        checkpoints.save(make_state(1), {"step": 1})
        checkpoints.save(make_state(2), {"step": 2})
    damage(tmp_path / "checkpoints/latest/2")
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, "latest", num_kept=2) as checkpoints:
        state, _ = checkpoints.restore(abstract(make_state(0)))
    assert int(state.step) == 1
    assert "cannot be read" in caplog.text
    damage(tmp_path / "checkpoints/latest/1")
    with Checkpoints(tmp_path, "latest", num_kept=2) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint can be read"):
            checkpoints.restore(abstract(make_state(0)))


def test_no_flipped_bit_is_taken_for_what_was_saved(tmp_path):
    """Of any file of a checkpoint: what comes back is exactly what was saved, from this step or the one before."""
    meta = {"rows": [{"loss": 0.123456789, "step": 12345}], "config": {"x": 1000}}
    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {"step": 1})
        checkpoints.save(make_state(2), meta)
    expected = {1: (make_state(1), {"step": 1}), 2: (make_state(2), meta)}
    rng, fallen = np.random.default_rng(), 0
    files = [path for path in (tmp_path / "checkpoints/latest/2").rglob("*") if path.is_file() and path.stat().st_size]
    metadata = [path for path in files if path.parent.name == "meta"]
    for path in [*files, *metadata * 5]:
        sound = path.read_bytes()
        bits = np.unpackbits(np.frombuffer(sound, np.uint8))
        bits[rng.integers(len(bits))] ^= 1
        path.write_bytes(np.packbits(bits).tobytes())
        with Checkpoints(tmp_path, "latest", read_only=True) as checkpoints:
            state, found = checkpoints.restore(abstract(make_state(0)))
        path.write_bytes(sound)
        wanted, wanted_meta = expected[int(state.step)]
        jax.tree.map(np.testing.assert_array_equal, state, wanted)
        assert found == wanted_meta, path
        fallen += int(state.step) == 1
    assert fallen >= 5


@pytest.mark.parametrize("item", ["params", "meta"])
def test_content_that_reads_well_and_is_not_what_was_saved_is_damage(tmp_path, item, monkeypatch):
    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {"a": 1})
        name = {"params": "digest_arrays", "meta": "digest_json"}[item]
        monkeypatch.setattr(f"cxa_jax.checkpointing.{name}", lambda _: "another")
        with pytest.raises(UserError, match=f"(?s)no checkpoint can be read.*{item}.*SHA-256 differs"):
            checkpoints.restore(abstract(make_state(0)))


def test_a_flipped_bit_in_the_name_of_the_digests_is_damage(tmp_path):
    """Without its name a digest compares nothing: what has digests by another name is none of an older version."""
    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {"a": 1})
    path = tmp_path / "checkpoints/latest/1/meta/metadata"
    sound = path.read_bytes()
    place = sound.index(b'"sha256"') + 1
    for byte in range(place, place + len("sha256")):
        altered = bytearray(sound)
        altered[byte] ^= 1 << np.random.default_rng().integers(7)
        path.write_bytes(altered)
        with Checkpoints(tmp_path, "latest", read_only=True) as checkpoints:
            with pytest.raises(UserError, match="no checkpoint can be read"):
                checkpoints.restore(abstract(make_state(0)))


def test_averaged_and_fitted_are_read_in_place_of_what_they_stand_for(tmp_path):
    plain, other = make_state(3), make_state(4)
    state = plain.replace(averaged_params=other.params, fitted_stats=other.batch_stats)
    mould = abstract(plain)
    with Checkpoints(tmp_path, "best") as checkpoints:
        checkpoints.save(state, {})
        variables, _ = checkpoints.restore_variables({"params": mould.params, "batch_stats": mould.batch_stats})
        jax.tree.map(np.testing.assert_array_equal, variables, other.variables)
        as_saved = checkpoints.restore_as_saved(plain.step.sharding)
        jax.tree.map(np.testing.assert_array_equal, as_saved, other.variables)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(state))[0], state)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(mould)[0], plain)
    path = tmp_path / "checkpoints/best/3/meta/metadata"
    sound = path.read_bytes()
    place = sound.index(b'"averaged_params"') + 1
    for byte in range(place, place + len("averaged_params"), 3):  # else the last step's would be taken, and not a word
        altered = bytearray(sound)
        altered[byte] ^= 1
        path.write_bytes(altered)
        with Checkpoints(tmp_path, "best", read_only=True) as checkpoints:
            with pytest.raises(UserError, match="no checkpoint can be read"):
                checkpoints.restore_variables({"params": mould.params, "batch_stats": mould.batch_stats})


def test_a_checkpoint_of_before_digests_is_read(tmp_path):
    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {"a": 1})
    path = tmp_path / "checkpoints/latest/1/meta/metadata"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    path.write_text(json.dumps(meta))
    with Checkpoints(tmp_path, "latest", read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[1]["a"] == 1


def test_a_full_disk_is_one_message_and_the_state_before_stays(tmp_path, monkeypatch):
    """As orbax's own thread meets it, in place of a file system's answer."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, "latest") as checkpoints:
        checkpoints.save(make_state(1), {})
        checkpoints.wait()
    monkeypatch.setattr("etils.epath.abstract_path.Path.write_text", fail)
    with pytest.raises(UserError, match="(?s)cannot be written to .*No space left on device.*make room"):
        with Checkpoints(tmp_path, "latest") as checkpoints:
            checkpoints.save(make_state(2), {})
    monkeypatch.undo()
    with Checkpoints(tmp_path, "latest", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(abstract(make_state(0)))
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))


def test_the_first_store_with_anything_sound_is_taken(tmp_path, caplog):
    with Checkpoints(tmp_path, "latest") as latest, Checkpoints(tmp_path, "best") as best:
        assert read_first(Checkpoints.read_meta, latest, best) is None
        best.save(make_state(1), {"of": "best"})
        best.wait()
        assert read_first(Checkpoints.read_meta, latest, best) == {"of": "best"}
        assert "nothing sound in" in caplog.text
        latest.save(make_state(2), {"of": "latest"})
        latest.wait()
        assert read_first(Checkpoints.read_meta, latest, best) == {"of": "latest"}
        damage(latest.directory)
        assert read_first(Checkpoints.read_meta, latest, best) == {"of": "best"}
        damage(best.directory)
        with pytest.raises(UserError, match="no checkpoint can be read"):
            read_first(Checkpoints.read_meta, latest, best)


def test_a_reader_changes_nothing(tmp_path):
    with Checkpoints(tmp_path, "best") as checkpoints:
        checkpoints.save(make_state(3), {})
    unfinished = tmp_path / "checkpoints/best/4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path, "best", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3]
    assert unfinished.exists()


def test_backbone_of_another_run(tmp_path):
    state = make_state(3).replace(
        params={"backbone": {"kernel": jnp.arange(6.0)}, "head": jnp.ones(2)},
        batch_stats={"backbone": {"mean": jnp.arange(3.0)}},
    )
    with Checkpoints(tmp_path, "best") as best:
        best.save(state, {"config": {"model.backbone": "resnet50"}, "progress": {"best_step": 3}})
    mould = abstract(make_state(0))
    wanted = {"model.backbone": "resnet50", "model.stride": 32, "model.stride_by": "cut"}
    loaded = load_backbone(tmp_path, wanted, mould)
    np.testing.assert_array_equal(loaded["params"]["kernel"], np.arange(6.0))
    np.testing.assert_array_equal(loaded["batch_stats"]["mean"], np.arange(3.0))
    with pytest.raises(UserError, match="has resnet50; wanted is the best state of a densenet121"):
        load_backbone(tmp_path, wanted | {"model.backbone": "densenet121"}, mould)
    with pytest.raises(UserError, match="no workdir with a best state"):
        load_backbone(tmp_path / "nowhere", wanted, mould)
    load_backbone(tmp_path, wanted | {"model.stride": 8, "model.stride_by": "dilate"}, mould)
    with pytest.raises(UserError, match="has a resnet50, whose stages end at stride 32; resnet50/8 ends at 8"):
        load_backbone(tmp_path, wanted | {"model.stride": 8}, mould)
