"""What is checked of GPUs where there is none: devices and ranks that are faked."""
from conftest import script

def test_nothing_is_made_on_the_wrong_device_and_ranks_keep_and_send_their_share(tmp_path):
    out = script(tmp_path, "tests/fake_devices.py")
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    assert out.stdout.count("on a faked device: ok") == 4, out.stdout
    assert out.stdout.count("a tensor on the CPU put in: FakeTensorDeviceMismatchError") == 2
    assert "d20 | modern | 1,024 |" in out.stdout
