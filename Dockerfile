# docker build -t gnws_d2 .                                     for CPUs
# docker build -t gnws_d2 --build-arg TORCH_BACKEND=cu130 .     for GPUs: docker run --gpus all ...
FROM python:3.11-slim
ARG TORCH_BACKEND=cpu
# OpenCV's.
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0
WORKDIR /gnws_d2
COPY . .
RUN TORCH_BACKEND=$TORCH_BACKEND UV_NO_CACHE=1 bash tools/setup_env.sh onnx
ENV PATH=/gnws_d2/.venv/bin:$PATH
ENTRYPOINT ["gnws"]
