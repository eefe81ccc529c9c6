import pytest

from nanotrain.config.errors import UserError
from nanotrain.pipeline.products import changed_file, load_record, product_digest, stamp_product
from nanotrain.pipeline.run import run_pipeline
from nanotrain.runtime.files import folder_digest
from tests.pipeline.fake_stages import FakeStages, build_report


def test_the_digest_of_a_product_is_the_digest_of_its_folder(tmp_path):
    for name in ("b.txt", "a/c.txt", "a.txt", "a-b/x", "a/B.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert product_digest(stamp_product(tmp_path)) == folder_digest(tmp_path)
    (tmp_path / "a.txt").write_text("other")
    assert product_digest(stamp_product(tmp_path)) == folder_digest(tmp_path)


def test_records_come_back_equal_and_see_every_change(load, folder):
    run_pipeline(load("pipeline"), FakeStages().table, report=build_report)
    entry = folder / "runs/toy/prune"
    record = load_record(entry)
    assert record is not None and changed_file(record, entry, read_all=True) is None
    (entry / "hf/deep/weights.safetensors").unlink()
    assert changed_file(record, entry, read_all=False) == "hf/deep/weights.safetensors"
    report = folder / "runs/toy/evaluate"
    record = load_record(report)
    assert record is not None and record.product == "results.json" and record.kind == "report"
    assert changed_file(record, report, read_all=True) is None
    (report / "results.json").write_text("{}")
    assert changed_file(record, report, read_all=False) == "results.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"product_files": 3}', "null"])
def test_a_damaged_record_is_a_users_error(tmp_path, text):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"stage\.json is damaged"):
        load_record(tmp_path)
    assert load_record(tmp_path / "absent") is None
