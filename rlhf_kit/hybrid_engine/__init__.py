"""One set of weights, two modes: DeepSpeed trains them, our decode loop generates from them."""
