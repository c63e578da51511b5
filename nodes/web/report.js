// A new report opens at a size at which its picture can be read. A saved workflow brings a size of its own.
import { app } from "../../scripts/app.js"

app.registerExtension({
  name: "SpargeAttn.report",
  nodeCreated(node) {
    if (node.comfyClass === "SpargeAttnReport") node.setSize([600, 1000])
  }
})
