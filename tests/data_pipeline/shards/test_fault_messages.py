from m2f.data_pipeline.shards.faults import Fault, parse_fault


def test_last_clause_of_a_message_is_the_remedy():
    fault = parse_fault("a.tar", "a.tar: not a tar; 2 bytes are missing; write the data set again")
    assert fault == Fault(object="a.tar", problem="not a tar; 2 bytes are missing", remedy="write the data set again")
    assert str(fault) == "a.tar: not a tar; 2 bytes are missing; write the data set again"


def test_message_without_a_remedy_is_the_problem():
    fault = parse_fault("a.tar", "sample 'x' has no labels")
    assert (fault.problem, fault.remedy) == ("sample 'x' has no labels", "")
    assert str(fault) == "a.tar: sample 'x' has no labels"
