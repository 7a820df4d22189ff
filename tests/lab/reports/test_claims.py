from ademamix.lab.experiments import EXPERIMENTS
from ademamix.lab.reports.claims import CLAIMS

NOT_THE_PAPERS = {"batch", "clip", "beyond", "geometry"}


def test_every_claim_is_decided_by_an_experiment_that_there_is() -> None:
    assert {claim.experiment for claim in CLAIMS.values()} == set(EXPERIMENTS) - NOT_THE_PAPERS
