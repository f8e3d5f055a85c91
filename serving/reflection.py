"""Both versions of gRPC reflection. grpcio-reflection has v1alpha; v1 is the same messages under another name."""

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

ALPHA = "grpc.reflection.v1alpha"
V1 = "grpc.reflection.v1"
SERVICE = "ServerReflection"


def add_to(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Let clients ask for the descriptions of these services, and of reflection itself."""
    _describe_v1()
    servicer = ReflectionServicer((*services, f"{ALPHA}.{SERVICE}", f"{V1}.{SERVICE}"))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": method}
    handler = grpc.method_handlers_generic_handler(f"{V1}.{SERVICE}", methods)
    server.add_generic_rpc_handlers((handler,))


def _describe_v1() -> None:
    """Put v1's description where reflection looks: tools that describe all they are told of stop at one they cannot."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(ALPHA, V1)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(ALPHA, V1)
        method.output_type = method.output_type.replace(ALPHA, V1)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
