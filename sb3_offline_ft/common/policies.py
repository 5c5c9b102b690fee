"""Where zip files of version 0.1.0 look for their policy's class, or for its base."""

from sb3_offline_ft.policies.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, OfflinePolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "OfflinePolicy"]
