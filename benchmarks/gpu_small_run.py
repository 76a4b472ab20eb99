"""A short run over every dtype, norm and kind of table: what tools/gpu.sh gives to compute-sanitizer."""

import math

import torch

import fastclip


def main() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for count, size in ((3, 5001), (400, 33), (2500, 9)):  # few and many in the parameters, on the device
            grads = list(torch.randn(count * size, device="cuda").to(dtype).split(size))
            parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            for norm_type in (1, 2, math.inf):
                fastclip.clip_grad_norm_(parameters, 0.5, norm_type)
            fastclip.clip_grad_value_(parameters, 1e-3)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
