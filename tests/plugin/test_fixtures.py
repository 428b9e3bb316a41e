"""Fixtures that a user's own tests may take."""


def test_session_fixtures_give_splits_logits_and_subsets(pytester, data_folder):
    """The splits, the teacher's logits and the standard KD subsets agree with each other."""
    pytester.makepyfile("""
        from datasets import load_from_disk

        def test_contract(sst2, teacher_logits, kd_subsets):
            assert (1120, 60, 60) == (len(sst2.train), len(sst2.dev), len(sst2.test))
            assert (1000, 2) == tuple(teacher_logits.values.shape)
            assert ["kd_1000", "kd_500"] == list(kd_subsets)
            large, small = (load_from_disk(path)[:] for path in kd_subsets.values())
            assert ["sentence", "label", "idx", "teacher_logits"] == list(large)
            for column in large:
                assert large[column][:500] == small[column]
            assert teacher_logits.values.tolist() == large["teacher_logits"]
            by_id = dict(zip(sst2.train.ids, sst2.train.sentences))
            assert large["sentence"] == [by_id[i] for i in large["idx"]]
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, deselected=1)
