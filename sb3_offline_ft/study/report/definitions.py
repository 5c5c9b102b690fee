"""What the words and numbers of a study's report mean."""

from sb3_offline_ft.evaluation.finetuning_metrics import BAND_SHARE, COLLAPSE_SHARE, CONSECUTIVE, LAST
from sb3_offline_ft.pages.words import counted
from sb3_offline_ft.study.report.analysis import StudyNumbers
from sb3_offline_ft.study.report.runs import last_evaluations

J0 = "J\N{SUBSCRIPT ZERO}"
SCALE = f"|{J0} - J_random|"

SOURCES = (
    "Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021, arXiv 2108.13264: "
    "interquartile means, stratified bootstrap, probability of improvement, performance profiles.",
    "Clopper and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934.",
    "Fisher, The Design of Experiments, 1935: the sign-flip permutation test.",
    "Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.",
    "Luo et al., Finetuning from Offline Reinforcement Learning: Challenges, Trade-offs and Practical Solutions, 2023, arXiv "
    "2303.17396: the methods that new studies compare.",
    "McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages, 1947.",
)


def definitions(numbers: StudyNumbers) -> list[str]:
    """How the numbers of a study are defined, in sentences."""
    protocol = numbers.protocol
    plan, own, random = protocol.evaluation, protocol.learner_evaluation, numbers.random_return
    known = "not known, so dips and collapses are not defined" if random is None else f"{random:,.6g}"
    texts = [
        "Served return is what everything that acted in the environment earned: training episodes, with their noise, and "
        "evaluations that a learner learns from, on one axis on which both are interactions. At each interaction it is the "
        "return of the episode that this belongs to, and a mean is over interactions. Methods are compared in the first "
        f"{protocol.interactions:,}. A policy that does not change is taken to serve the episodes that it was measured in, "
        f"one after the other. {J0} served is the mean of the episodes that ended in the warm-up, and shortfall the sum of "
        f"({J0} - return) / {SCALE} over the episodes after it. Without episodes after it all count.",
        f"J(t) is the mean undiscounted return of {counted(plan.episodes, 'episode')} with the policy after t interactions, "
        f"without exploration noise, measured every {plan.every:,} interactions. Learners never see these evaluations.",
        f"{J0} is the mean over all episodes of the evaluations of the pretrained policy, before and during the warm-up. "
        f"J_random, the mean return of a random policy, is {known}.",
        f"Dip depth is ({J0} - lowest J) / {SCALE} after the warm-up: 1 is as bad as a random policy. Dip area is the mean "
        f"over time of max(0, {J0} - J) / {SCALE}.",
        f"The band reaches down from {J0} by {BAND_SHARE:.0%} of {SCALE}, or by two standard errors of {J0} if that is more. "
        f"A run has recovered at the first of {CONSECUTIVE} evaluations in a row that are in the band or above it, after its "
        "lowest one.",
        f"A run has collapsed if any J is at or below J_random + {COLLAPSE_SHARE:g} ({J0} - J_random). Papers name no "
        "threshold; this one is ours.",
        "The noise of an unchanged policy: the dips of runs whose evaluations are drawn anew from episodes of the frozen "
        "policy (bootstrap, 10,000 times for each seed). The picture shows the noisiest seed's; the verdict compares each run "
        "with its own. One unchanged policy in twenty dips deeper than its floor, so of many runs some do by chance. With few "
        "episodes, or returns that are skewed towards low values as those of a policy that rarely falls, the floor is "
        "optimistic: of simulated unchanged policies with such returns 44 % were deeper with 30 episodes of the frozen "
        "policy, and 15 % with 300.",
        f"The end of a run is the mean of its last {LAST} evaluations after the warm-up, or of all if there are fewer: here "
        f"of {last_evaluations(numbers.runs)}. Over time is the mean of all evaluations after the warm-up, from scratch of "
        "all: what users of the learning policy would have got. Training is the mean return of the training episodes, with "
        "exploration noise.",
        "Best kept is what one has at the end who keeps the best evaluated policy so far, the pretrained one included, rather "
        "than the last: half of the episodes of each evaluation choose it, the other half measure it (the mean of both ways "
        "round). It needs evaluations in which a fall does no harm.",
        "Intervals are 95 % bootstrap intervals over seeds, within datasets (percentiles). Of normally distributed runs they "
        "cover the true mean in about 84 % of the cases with 5 seeds and in 89 % with 10, less often if runs sometimes fail. "
        "Collapse rates have exact intervals. Whether intervals of two methods overlap is no test of their difference.",
    ]
    if any(one.learner_evaluation_steps for one in numbers.runs):
        texts.append(
            f"Some methods learn from evaluations of their own ({counted(own.episodes, 'episode')} every {own.every:,} "
            "interactions): these cost environment steps besides the interactions, which the tables count."
        )
    if len(numbers.shown_methods) < len(numbers.methods):
        texts.append("Variants by factors are left out of pictures over all methods; they have parts of their own.")
    if numbers.scale_words:
        texts.append(f"Normalised scores: {numbers.scale_words}")
    return texts
