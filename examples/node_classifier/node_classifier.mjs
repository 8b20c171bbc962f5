// Classify a picture in Node with transformers.js, from a folder that msn-export hub wrote:
//     node examples/node_classifier/node_classifier.mjs FOLDER PICTURE
import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, picture] = process.argv.slice(2);
env.allowRemoteModels = false; // the folder has all that is needed
env.localModelPath = path.dirname(path.resolve(folder));
const classify = await pipeline("image-classification", path.basename(path.resolve(folder)), { dtype: "fp32" });
for (const { label, score } of await classify(picture, { top_k: 5 })) {
  console.log(`${score.toFixed(3)}  ${label}`);
}
