# vLLM's image with this plugin. Build it at the root of the repository:
#     docker build --tag vllm-sparsed .
# The entry point is vLLM's, `vllm serve`: docs/recipes.md has commands.
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}

# .dockerignore lets through what the package is built from, and nothing else.
COPY . /tmp/vllm_sparsed
# The image has all that the plugin needs, in the versions that its vLLM asks for.
RUN uv pip install --system --no-cache --no-deps /tmp/vllm_sparsed \
    && rm -r /tmp/vllm_sparsed
