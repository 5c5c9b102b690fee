"""Learning fast while serving safely. The names are imported on first use (PEP 562)."""

from typing import TYPE_CHECKING

from sb3_offline_ft.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_offline_ft.deployment.budget import Level, RiskBudget
    from sb3_offline_ft.deployment.champion_challenger import ChampionChallenger
    from sb3_offline_ft.deployment.contest import Contest
    from sb3_offline_ft.deployment.promotion import ConcurrentTest, HistoricalTest, PromotionTest
    from sb3_offline_ft.deployment.roles import Contender, Kind, Verdict
    from sb3_offline_ft.deployment.rules import Rules

__all__ = [
    "ChampionChallenger",
    "ConcurrentTest",
    "Contender",
    "Contest",
    "HistoricalTest",
    "Kind",
    "Level",
    "PromotionTest",
    "RiskBudget",
    "Rules",
    "Verdict",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "budget": ("Level", "RiskBudget"),
        "champion_challenger": ("ChampionChallenger",),
        "contest": ("Contest",),
        "promotion": ("ConcurrentTest", "HistoricalTest", "PromotionTest"),
        "roles": ("Contender", "Kind", "Verdict"),
        "rules": ("Rules",),
    },
)
