"""stable-baselines3's PPO and A2C in an environment of one number."""

import pytest
import torch
from trainer_support import check_program, learned

np = pytest.importorskip("numpy")
stable_baselines3 = pytest.importorskip("stable_baselines3")
gymnasium = pytest.importorskip("gymnasium")

TIMESTEPS, ROLLOUT = 64, 16


class Steering(gymnasium.Env):
    """Keep a position near 0 by pushing it. Actions are continuous: rounding cannot turn one into another."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.uniform(-3, 3), 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.position], np.float32)

    def step(self, action):
        self.position += float(action[0])
        self.steps += 1
        return self.observation(), -(self.position**2), False, self.steps == 8, {}


def train(clip, algorithm, **options):
    agent = getattr(stable_baselines3, algorithm)(
        "MlpPolicy",
        Steering(),
        n_steps=ROLLOUT,
        learning_rate=0.01,
        max_grad_norm=clip,
        policy_kwargs={"net_arch": [16], "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
        seed=0,
        device="cpu",
        **options,
    )
    agent.learn(TIMESTEPS)
    return learned(agent.policy, rewards=[episode["r"] for episode in agent.ep_info_buffer])


def test_ppo():
    epochs, batch = 2, 8
    check_program(
        lambda clip: train(clip, "PPO", n_epochs=epochs, batch_size=batch),
        clip=0.5,
        calls=TIMESTEPS // batch * epochs,
    )


def test_a2c():
    check_program(lambda clip: train(clip, "A2C"), clip=0.5, calls=TIMESTEPS // ROLLOUT)
