"""Forward and backward passes of MLPs with LayerNorm, written out on memory that is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch as th

from sb3_offline_ft.update.networks import FlatParameters, Layer
from sb3_offline_ft.update.products import LARGE, Products

_relu_backward = th.ops.aten.threshold_backward.grad_input
_tanh_backward = th.ops.aten.tanh_backward.grad_input
_layer_norm_backward = th.ops.aten.native_layer_norm_backward.default


@dataclass(frozen=True)
class LayerTensors:
    """Parameters of one layer of one network, or their gradients: weight ``(out, in)``, the others ``(out,)``."""

    weight: th.Tensor
    bias: th.Tensor
    norm_weight: th.Tensor | None
    norm_bias: th.Tensor | None


def layer_tensors(layers: Sequence[Layer], parameters: FlatParameters, memory: th.Tensor) -> list[list[LayerTensors]]:
    """The tensors of each layer of each network, views of memory with the parameters' layout: themselves, or gradients."""
    views = iter(parameters.views(memory))
    by_layer = [[[next(views) for _ in group] for group in layer.parameter_groups] for layer in layers]
    return [
        [
            LayerTensors(groups[0][i], groups[1][i], *((groups[2][i], groups[3][i]) if layer.norms else (None, None)))
            for layer, groups in zip(layers, by_layer, strict=True)
        ]
        for i in range(len(layers[0].linears))
    ]


class Scratch:
    """Memory for intermediate results, shared by passes that do not need each other's: what stays in the cache is fast."""

    def __init__(self, batch_size: int, like: th.Tensor) -> None:
        self.batch_size = batch_size
        self._like = like
        self._memory: dict[str, th.Tensor] = {}

    def reserve(self, slot: str, n_columns: int) -> None:
        """Make a named piece of memory so large that :meth:`view` can be asked for these columns."""
        size = self.batch_size * n_columns
        if slot not in self._memory or self._memory[slot].numel() < size:
            self._memory[slot] = self._like.new_empty(size)

    def view(self, slot: str, n_columns: int) -> th.Tensor:
        """A named piece of memory as a matrix."""
        return self._memory[slot][: self.batch_size * n_columns].view(self.batch_size, n_columns)


class _LayerPass:
    """One layer's share of the passes."""

    def __init__(
        self,
        layer: Layer,
        tensors: LayerTensors,
        gradients: LayerTensors | None,
        scratch: Scratch,
        index: int,
        n_layers: int,
        network: int,
        products: Products,
    ) -> None:
        n_out, n_in = tensors.weight.shape
        may_be_rounded = 0 < index < n_layers - 1
        chosen = min(n_out, n_in, scratch.batch_size) >= LARGE and (products.is_single_precision or may_be_rounded)
        self.multiply = products.multiply if chosen else th.mm
        self.weight, self.transposed_weight, self.bias = tensors.weight, tensors.weight.mT, tensors.bias
        self.gradients = gradients
        self.is_relu, self.is_tanh = layer.activation == "relu", layer.activation == "tanh"
        self.norm: tuple[th.Tensor, th.Tensor] | None = None
        if tensors.norm_weight is not None and tensors.norm_bias is not None:
            self.norm = (tensors.norm_weight, tensors.norm_bias)
            self.norm_module = layer.norms[network]
        self.norm_shape = (n_out,)
        self.is_scalar = n_out == 1
        self.linear = scratch.view(f"linear{index}" if layer.norms else f"output{index}", n_out)
        self.output = self.linear
        # The output's memory is free when the gradient of the input is written
        self.input_gradient = scratch.view(f"output{index}", n_in)

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.input = x
        # Adding the bias afterwards is faster than a product that begins with it
        self.multiply(x, self.transposed_weight, out=self.linear)
        self.linear.add_(self.bias)
        if self.norm is not None:
            self.output, self.mean, self.reciprocal_std = th.native_layer_norm(
                self.linear, self.norm_shape, *self.norm, self.norm_module.eps
            )
        if self.is_relu:
            self.output.clamp_min_(0)
        elif self.is_tanh:
            self.output.tanh_()
        return self.output

    def backward_parameters(self, gradient: th.Tensor) -> th.Tensor:
        """From the output's gradient, which is overwritten, to those of the parameters and of the linear layer's output."""
        gradients = self.gradients
        if self.is_relu:
            _relu_backward(gradient, self.output, 0, grad_input=gradient)
        elif self.is_tanh:
            _tanh_backward(gradient, self.output, grad_input=gradient)
        if self.norm is not None:
            gradient = self._through_norm(gradient, *self.norm)
        if gradients is not None:
            self.multiply(gradient.mT, self.input, out=gradients.weight)
            th.sum(gradient, 0, out=gradients.bias)
        return gradient

    def backward(self, gradient: th.Tensor) -> th.Tensor:
        """The same, on to the gradient of the input."""
        gradient = self.backward_parameters(gradient)
        if self.is_scalar:
            return th.mul(gradient, self.weight, out=self.input_gradient)
        self.multiply(gradient, self.weight, out=self.input_gradient)
        return self.input_gradient

    def _through_norm(self, gradient: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        gradients = self.gradients
        wanted = [True, gradients is not None, gradients is not None]
        inner, weight_gradient, bias_gradient = _layer_norm_backward(
            gradient, self.linear, self.norm_shape, self.mean, self.reciprocal_std, weight, bias, wanted
        )
        if gradients is not None:
            assert gradients.norm_weight is not None and gradients.norm_bias is not None
            gradients.norm_weight.copy_(weight_gradient)
            gradients.norm_bias.copy_(bias_gradient)
        return inner  # type: ignore[no-any-return]


class MlpPass:
    """
    Forward and backward passes of one MLP at one batch size.

    :param layers: Its layers, of which those of other networks are left alone
    :param network: Which of the networks of these layers it is
    :param tensors: Their parameters
    :param gradients: Where gradients are written; None if they are not wanted
    :param scratch: Memory for intermediate results, which the next pass on it overwrites
    :param products: How large matrix products are computed
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        network: int,
        tensors: Sequence[LayerTensors],
        gradients: Sequence[LayerTensors] | None,
        scratch: Scratch,
        products: Products,
    ) -> None:
        for index, (layer, own) in enumerate(zip(layers, tensors, strict=True)):
            scratch.reserve(f"output{index}", max(own.weight.shape))
            if layer.norms:
                scratch.reserve(f"linear{index}", own.weight.shape[0])
        self._layers = [
            _LayerPass(
                layer, tensors[i], None if gradients is None else gradients[i], scratch, i, len(layers), network, products
            )
            for i, layer in enumerate(layers)
        ]
        self._inner_layers_backwards = self._layers[:0:-1]

    def forward(self, x: th.Tensor) -> th.Tensor:
        """From the input ``(batch, n_in)`` to the output ``(batch, n_out)``, in the scratch memory."""
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def backward(self, gradient: th.Tensor, columns: slice | None = None) -> th.Tensor:
        """
        Write the parameters' gradients, if they are wanted. Ends what :meth:`forward` has begun: its results are overwritten.

        :param gradient: Gradient of the output, shape ``(batch, n_out)``, in memory of its own; it is overwritten
        :param columns: Columns of the input whose gradient is wanted
        :return: The gradient of these columns, shape ``(batch, n_columns)``; without columns, that of the first linear layer's
            output
        """
        for layer in self._inner_layers_backwards:
            gradient = layer.backward(gradient)
        first = self._layers[0]
        gradient = first.backward_parameters(gradient)
        return gradient if columns is None else th.mm(gradient, first.weight[:, columns])
