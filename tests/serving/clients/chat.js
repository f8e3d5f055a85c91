// A chat streamed by Node.js from the committed proto: node chat.js PROTO_FOLDER TARGET QUESTION
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [folder, target, question] = process.argv.slice(2);
const options = { keepCase: true, longs: String, enums: String, includeDirs: [folder] };
const { vivace } = grpc.loadPackageDefinition(
  loader.loadSync("vivace/v1/inference.proto", options),
);
const client = new vivace.v1.Inference(target, grpc.credentials.createInsecure());
const call = client.Chat({
  messages: [{ role: "user", content: question }],
  sampling: { temperature: 0 },
});
const texts = [];
let finish = null;
call.on("data", (message) => {
  texts.push(message.text ?? "");
  finish = message.finish ?? finish;
});
call.on("error", (error) => {
  console.error(`${error.code}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => {
  console.log(JSON.stringify({ texts, reason: finish && finish.reason }));
  client.close();
});
