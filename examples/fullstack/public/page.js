// Starts the page. It shows a change only after the server has confirmed it.
import { startList } from "./list.js";
import { startSession } from "./session.js";

startList();
startSession();
