from ademamix.lab.experiments import NAMES
from ademamix.lab.reports.claims import CLAIMS, decide


def test_nothing_is_reproduced_from_one_seed():
    assert decide("tokens", True, "", [1.0, 2.0], [1.0]).verdict == "not tested at this size"
    assert decide("tokens", True, "", [1.0, 2.0], [1.0, 2.0]).verdict == "reproduced"
    assert decide("tokens", False, "", [1.0, 2.0], [1.0, 2.0]).verdict == "not reproduced"


def test_every_claim_is_decided_by_an_experiment_that_there_is():
    assert {claim.experiment for claim in CLAIMS.values()} == set(NAMES) - {"beyond", "geometry"}  # not the paper's
