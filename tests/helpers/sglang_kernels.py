"""SGLang's kernels in torch: what Triton's interpreter does slowly, for many requests at once.

Each is compared with its kernel, in the interpreter, before it is used.
"""

from __future__ import annotations

import torch


def verification(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    block_verification: bool = False,
    **_: object,
) -> None:
    """chain_speculative_sampling_triton: Leviathan et al. 2023 or, by blocks, Sun et al. 2024."""
    rows, steps = torch.arange(len(candidates)), candidates.shape[1] - 1
    drafted = candidates[:, 1:, None]
    p = target_probs[:, :steps].gather(2, drafted).squeeze(2)
    q = draft_probs.gather(2, drafted).squeeze(2)
    coins = uniform_samples[:, :steps]
    weight = torch.ones(len(rows), steps + 1)
    if block_verification:
        for step in range(steps):
            weight[:, step + 1] = (weight[:, step] * p[:, step] / q[:, step]).clamp(max=1)
        chance = weight[:, 1:].clone()
        for step in range(1, steps):
            left = (weight[:, step, None] * target_probs[:, step] - draft_probs[:, step]).clamp(
                min=0
            )
            mass, certain = left.sum(-1), weight[:, step] == 1
            chance[:, step - 1] = torch.where(certain, 1.0, mass / (mass + 1 - weight[:, step]))
        passed = coins < chance
        accepted = (passed * torch.arange(1, steps + 1)).amax(1)
    else:
        accepted = (coins * q < p).long().cumprod(1).sum(1)
    accept_token_num.copy_(accepted)
    accept_index[:, 0] = retrive_index[:, 0]
    for step in range(1, steps + 1):
        kept = accepted >= step
        predicts[retrive_index[kept, step - 1]] = candidates[kept, step].int()
        accept_index[kept, step] = retrive_index[kept, step].int()
    # After the last draft token there is no q: the token is sampled from p.
    subtracted = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))[rows, accepted]
    scale = torch.where(accepted == steps, 1.0, weight[rows, accepted])[:, None]
    residual = (scale * target_probs[rows, accepted] - subtracted).clamp(min=0)
    threshold = uniform_samples_for_final_sampling * residual.sum(-1)
    final = (residual.cumsum(-1) > threshold.unsqueeze(1)).int().argmax(-1)
    predicts[retrive_index[rows, accepted]] = final.int()


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column): [n], [n], [m] -> [n, m], in int64."""
    mask = 0xFFFFFFFF
    seed, positions = seed.to(torch.int64)[:, None], positions.to(torch.int64)[:, None]
    hashed = torch.zeros(len(seed), len(col_indices), dtype=torch.int64)
    for key in (seed & mask, seed >> 32 & mask, positions & mask, col_indices[None] & mask):
        mixed = key * 0xCC9E2D51 & mask
        mixed = (mixed << 15 | mixed >> 17) & mask
        hashed = hashed ^ (mixed * 0x1B873593 & mask)
        hashed = (hashed << 13 | hashed >> 19) & mask
        hashed = (hashed * 5 + 0xE6546B64) & mask
    hashed = hashed ^ 16
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & mask
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & mask
    return hashed ^ hashed >> 16
